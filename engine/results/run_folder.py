"""A run's folder: written beside its final place, and moved there whole when the run is finished.

`config.yaml` (resolved, loadable again), `summary.json`, `requests.parquet`, `iterations.parquet`, and, when asked for,
`trace.json` (for chrome://tracing or Perfetto). A run that is interrupted or fails leaves nothing that looks finished;
what a killed one leaves is removed by the next run into the same folder.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import InputError
from engine.results.files import write_json
from engine.results.folders import ELSEWHERE, FULL, cant_write, made, remove_empty, take
from engine.results.tables import open_parquet

MOST_TARGET = 200  # bytes of the name of a run's folder: beside it are some with longer ones


class _TakenError(InputError):
    """The run is finished, but not where it should be."""


class InterruptedRunError(Exception):
    """A run was interrupted; the message says where its finished part is kept."""


@contextmanager
def run_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write a run into; it becomes `target` when the block ends well, and is removed when it fails.

    What a killed run into `target` left behind is removed first. Raises InputError if `target` is in use, at once; if
    another run took it meanwhile, this one's results are kept beside it and the error says where.
    """
    try:
        target = target.absolute()
        if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
            what = "is a link" if target.is_symlink() else "is not empty" if target.is_dir() else "is a file"
            raise InputError(f"output folder {target} {what}: give another --output-dir")
        if len(target.name.encode("utf-8", "replace")) > MOST_TARGET:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))  # before it has run
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise cant_write(target, error) from None
    with _unowned(target):
        pass  # another command that is at it is told of now, not when the run is finished
    missing = made(target.parent)
    try:
        _remove_abandoned(target)
        partial, lock = _new_partial(target)
    except OSError as error:
        remove_empty(missing)
        raise cant_write(target, error) from None
    try:
        yield partial
        partial.chmod(0o755)
        try:
            with _unowned(target):
                partial.rename(target)
        except (OSError, InputError) as error:
            kept = _move_beside(partial, target, ".kept")
            why = error.strerror if isinstance(error, OSError) else str(error).partition(":")[0]
            raise _TakenError(f"{target} was taken meanwhile ({why}); the results are in {kept}") from None
    except _TakenError:
        raise
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        remove_empty(missing)
        if isinstance(error, OSError) and error.errno in FULL:
            raise cant_write(target, error) from None
        if isinstance(error, OSError):
            why = f"{error.strerror or error}: {ELSEWHERE}"
            raise OSError(error.errno, f"can't write the results: {why}", str(target)) from error
        raise
    finally:
        os.close(lock)


@contextmanager
def _unowned(target: Path) -> Iterator[None]:
    """Hold the lock of an empty folder that is to be replaced. Raises InputError where a command works in it."""
    if not target.is_dir():
        yield
        return
    lock = os.open(target, os.O_RDONLY)
    try:
        take(lock, target)
        yield
    finally:
        os.close(lock)


def _new_partial(target: Path) -> tuple[Path, int]:
    """Make a partial folder and lock it. The lock, which goes when its process ends however it ends, marks the owner.

    Returns the folder and the descriptor that holds the lock.
    """
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another run took it for abandoned, between the two lines above, and removes it
            os.close(lock)
            continue
        except OSError:  # a file system without locks, where nothing is taken for abandoned
            return partial, lock
        if partial.exists():
            return partial, lock
        os.close(lock)


def _remove_abandoned(target: Path) -> None:
    """Remove the partial folders of `target` that no process owns any more."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        try:
            lock = os.open(partial, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # its owner lives, or there are no locks here
            continue
        else:
            shutil.rmtree(partial, ignore_errors=True)
        finally:
            os.close(lock)


@contextmanager
def kept_if_interrupted(folder: Path, target: Path, proof: str) -> Iterator[None]:
    """Keep an interrupted run's folder once the file `proof` is in it.

    Raises InterruptedRunError, which says where, in place of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not (folder / proof).exists():
            raise
        kept = keep_incomplete(folder, target)
        raise InterruptedRunError(f"interrupted: what was finished is in {kept}") from None


def keep_incomplete(folder: Path, target: Path) -> Path:
    """Move what a failed run has written so far beside `target`, under a name that says so, and return where."""
    folder.chmod(0o755)
    return _move_beside(folder, target, ".incomplete")


def _move_beside(folder: Path, target: Path, mark: str) -> Path:
    for number in range(1, 1000):
        kept = target.absolute().with_name(f"{target.name}{mark}{'' if number == 1 else number}")
        if not kept.exists():
            return folder.rename(kept)
    raise InputError(f"too many folders named {target.name}{mark}*: remove some")


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
    shown = ("num_tokens", "num_decodes", "num_prefills", "kv_blocks", "num_running", "num_waiting")
    with (folder / "trace.json").open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        separator = "\n"
        named = set()
        for batch in open_parquet(folder / "iterations.parquet").iter_batches():
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
