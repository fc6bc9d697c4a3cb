"""A run's folder: written beside its final place, and moved there whole when the run is finished.

`config.yaml` (resolved, loadable again), `summary.json`, `requests.parquet`, `iterations.parquet`, and, when asked for,
`trace.json` (for chrome://tracing or Perfetto). A run that is interrupted or fails leaves nothing that looks finished.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.results.files import write_json


class _TakenError(InputError):
    """The run is finished, but not where it should be."""


@contextmanager
def run_folder(target: Path) -> Iterator[Path]:
    """A folder to write a run into; it becomes `target` when the block ends well and is removed when it does not.

    Raises InputError if `target` is in use, at once; if another run took it meanwhile, this one's folder is kept and
    the error says where.
    """
    target = target.absolute()
    try:
        if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
            what = "is a link" if target.is_symlink() else "is not empty" if target.is_dir() else "is a file"
            raise InputError(f"output folder {target} {what}: give another --output-dir")
        missing = [folder for folder in target.parents if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise InputError(f"can't write to {target}: {error.strerror}: give another --output-dir") from None
    try:
        yield partial
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError as error:
            raise _TakenError(
                f"{target} was taken meanwhile ({error.strerror}); the results are in {partial}"
            ) from None
    except _TakenError:
        raise
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if isinstance(error, OSError):
            why = f"{error.strerror or error}: free some space, or give another --output-dir"
            raise OSError(error.errno, f"can't write the results: {why}", str(target)) from error
        raise


def keep_incomplete(folder: Path, target: Path) -> Path:
    """Keep what a failed run has written so far, beside `target` under a name that says so. Returns where."""
    for number in range(1, 1000):
        kept = target.absolute().with_name(f"{target.name}.incomplete{'' if number == 1 else number}")
        if not kept.exists():
            folder.chmod(0o755)
            return folder.rename(kept)
    raise InputError(f"too many incomplete runs beside {target}: remove some")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """`config.yaml`: every setting of the run, as the command line reads it again."""
    import yaml

    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def write_summary(folder: Path, summary: Mapping[str, Any], name: str = "summary.json") -> None:
    """Write the file of results, whole or not at all."""
    write_json(folder / name, summary)


def write_chrome_trace(folder: Path) -> None:
    """`trace.json` from `iterations.parquet`: a process for each replica, a thread for each stage, times in us."""
    import pyarrow.parquet as pq

    shown = ("num_tokens", "num_decodes", "num_prefills", "kv_blocks", "num_running", "num_waiting")
    with (folder / "trace.json").open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        separator = "\n"
        named = set()
        for batch in pq.ParquetFile(folder / "iterations.parquet").iter_batches():
            for row in batch.to_pylist():
                place = {"pid": row["replica"], "tid": row["stage"], "ph": "M"}
                if (row["replica"], row["stage"]) not in named:
                    named.add((row["replica"], row["stage"]))
                    for kind, name in (
                        ("process_name", f"replica {place['pid']}"),
                        ("thread_name", f"stage {place['tid']}"),
                    ):
                        file.write(separator + json.dumps({**place, "name": kind, "args": {"name": name}}))
                        separator = ",\n"
                event = {
                    "name": f"{row['num_decodes']} decodes + {row['num_tokens'] - row['num_decodes']} prefill tokens",
                    "ph": "X",
                    "pid": row["replica"],
                    "tid": row["stage"],
                    "ts": 1e6 * row["start_s"],
                    "dur": 1e6 * row["duration_s"],
                    "args": {key: row[key] for key in shown},
                }
                file.write(separator + json.dumps(event))
                separator = ",\n"
        file.write("\n]}\n")
