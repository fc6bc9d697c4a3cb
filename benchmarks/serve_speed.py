"""How a simulated server keeps up: many streams at once without an error, and its times seen from outside.

Two processes, the server and the load generator, on this machine; both parts want two cores that nothing else uses.

    python benchmarks/serve_speed.py               # both parts, about a minute
    python benchmarks/serve_speed.py --streams 1000 --part streams

Streams: a closed loop of that many, three requests each of 64 output tokens; every one has to be answered whole.
Times: four replicas, 200 requests/s of 64 prompt and 16 output tokens; what `validate --against` measures of the server
is held against the simulation of the same arrivals: at P50 within 2 ms or 3 %, at P99 within 20 ms or 5 %.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPLICA = ["--model", "mistralai/Mistral-7B-v0.1", "--device", "a100", "--engine", "vllm@0.15", "--num-replicas", "4"]
BOUNDS = {"p50": (0.002, 0.03), "p99": (0.020, 0.05)}  # seconds, or a share
STREAMED_TOKENS = 64


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve simulated replicas on a free port; gives the URL."""
    command = [sys.executable, "-m", "cli", "serve", "--simulate", *REPLICA, "--port", "0", "--output-dir", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r" at (http://127\.0\.0\.1:\d+)/v1 ", line):
                break
        else:
            raise SystemExit("the server ended before it served")
        yield found[1]
    finally:
        process.terminate()
        process.communicate()


def asked(*arguments: str) -> dict[str, object]:
    """Run a command of windtunnel and return what it prints as JSON."""
    done = subprocess.run([sys.executable, "-m", "cli", *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def streams(count: int, folder: Path) -> bool:
    """Return whether so many streams at once are all answered whole."""
    lengths = ["--workload", "fixed", "--input-len", "64", "--output-len", str(STREAMED_TOKENS)]
    with serving(folder / "served") as url:
        found = asked("bench", "--url", url, *lengths, "--max-concurrency", str(count), "--num-prompts", str(3 * count),
                      "--output-dir", str(folder / "outside"))  # fmt: skip
    whole = found["total_output_tokens"] == 3 * count * STREAMED_TOKENS
    cut = "" if whole else ", answers cut short"
    print(f"{count:,} streams at once, {3 * count:,} requests: {found['failed']} errors{cut}, "
          f"{found['output_throughput']:,.0f} output tokens/s")  # fmt: skip
    return whole and found["failed"] == 0


def times(requests: int, folder: Path) -> bool:
    """Return whether times from outside are within bounds of the simulation of the same arrivals."""
    load = ["--workload", "fixed", "--input-len", "64", "--output-len", "16", "--request-rate", "200"]
    with serving(folder / "timed") as url:
        found = asked("validate", "--against", url, *REPLICA, *load, "--num-prompts", str(requests),
                      "--output-dir", str(folder / "check"))  # fmt: skip
    (result,) = found["loads"]  # type: ignore[misc, str-unpack]
    print(f"{requests:,} requests at 200/s, outside less simulated:")
    every = True
    for metric, statistics in result["latencies"].items():  # type: ignore[index]
        for statistic, (seconds, share) in BOUNDS.items():
            outside, simulated = (statistics[statistic][name] for name in ("engine_s", "simulated_s"))
            off = outside - simulated
            held = abs(off) <= max(seconds, share * simulated)
            every = every and held
            print(f"  {metric} {statistic}: {1e3 * off:+.2f} ms ({off / simulated:+.1%} of {1e3 * simulated:.2f} ms)"
                  f"{'' if held else ', out of bounds'}")  # fmt: skip
    return every


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("streams", "times", "both"), default="both")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=2000)
    given = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as folder:
        if given.part != "times":
            good = streams(given.streams, Path(folder))
        if given.part != "streams":
            good = times(given.requests, Path(folder)) and good
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{used.ru_utime + used.ru_stime:.0f} s of processor time")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
