"""A process that outlives a killed driver just long enough to end the Ray processes which the driver has started.

The kernel ends most of a local cluster with its driver, but not what the raylet starts: its agents notice at once and
then try for a minute to report it to a server that is gone. Here the end of the driver is the end of a pipe.

    before = descendants(os.getpid())
    ray.init()
    reaper = start(before)
    ...
    ray.shutdown()
    reaper.communicate()
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path


def descendants(root: int) -> set[tuple[int, int]]:
    """Return the processes below `root`, each by its id and the time at which it started."""
    children: dict[int, list[tuple[int, int]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = path.read_text("utf-8", "replace").rsplit(")", 1)[1].split()
            children.setdefault(int(fields[1]), []).append((int(path.parent.name), int(fields[19])))
    found: set[tuple[int, int]] = set()
    left = [root]
    while left:
        for process in children.get(left.pop(), []):
            found.add(process)
            left.append(process[0])
    return found


def start(before: set[tuple[int, int]]) -> subprocess.Popen[bytes]:
    """Start the process: it ends those descendants of this process that are not among `before` when this one ends."""
    processes = [f"{pid}:{started}" for pid, started in sorted(descendants(os.getpid()) - before)]
    command = [sys.executable, __file__, *processes]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # which Ctrl-C does not reach


def main(processes: list[str]) -> None:
    """Wait for the end of standard input, then kill what is left of `processes` (each "id:start")."""
    sys.stdin.read()
    for pid, started in (map(int, each.split(":")) for each in processes):
        with contextlib.suppress(OSError):  # it has ended
            fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rsplit(")", 1)[1].split()
            if int(fields[19]) == started:  # and not another that got its id
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
