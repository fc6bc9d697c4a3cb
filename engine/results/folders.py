"""Where results go: one check of the folder, and one owner at a time for a folder that is written to over a while.

An owner holds a lock on the folder itself, which goes when its process ends, however that is, and leaves no file.

    with owned(Path("runs/capacity"), ours=("settings.json",)): ...
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.documents import shown
from engine.errors import DiskFullError, InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OURS = (".json", ".jsonl", ".csv", ".html")  # endings of the files that are moved to their place whole
ELSEWHERE = "give another --output-dir"
FREE = "free some space, or write elsewhere"


def made(folder: Path) -> list[Path]:
    """Make a folder and return those that were made for it, the innermost first. Raises InputError where it can't be.

    A link is followed if it leads to a folder.
    """
    missing: list[Path] = []
    try:
        if not folder.name:
            folder = folder.resolve()
        for each in (folder, *folder.parents):
            if each.is_symlink() and not each.exists():
                raise InputError(f"output folder {shown(folder)}: {shown(each)} is a link to nowhere: {ELSEWHERE}")
            if os.path.lexists(each):
                break
            missing.append(each)
        folder.mkdir(parents=True, exist_ok=True)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        remove_empty(missing)
        raise cant_write(folder, error) from None
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that are there and empty, in their order."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def cant_write(folder: Path, error: OSError | ValueError) -> InputError:
    """Return the error for a folder that can't be written to, with what to do."""
    full = isinstance(error, OSError) and error.errno in FULL
    why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    kind = DiskFullError if full else InputError
    return kind(f"can't write to {shown(folder)}: {why}: {'free some space, or ' * full}{ELSEWHERE}")


@contextmanager
def owned(folder: Path, ours: Collection[str] = ()) -> Iterator[None]:
    """Make a folder if it is not there and own it until the block ends.

    Args:
        folder: where the results go.
        ours: names of files that say whose folder it is, and are not worth to be kept on their own: where the block
            fails with nothing else in a folder that was new, that is removed.

    Raises InputError for a path that can't be a folder, a disk that is full, and a folder that another process owns,
    with which one.
    """
    missing = made(folder)
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        remove_empty(missing)
        raise cant_write(folder, error) from None
    try:
        take(lock, folder)
        for name in ours:  # half-written by an owner that was killed
            unfinished(folder / name).unlink(missing_ok=True)
        new, there = not any(folder.iterdir()), {place for place, _, _ in os.walk(folder)}
        try:
            yield
        except BaseException as error:
            made_since = [place for place, _, _ in os.walk(folder, topdown=False) if place not in there]
            remove_empty(map(Path, made_since))
            if new and not _results(folder, ours):
                shutil.rmtree(folder, ignore_errors=True)
                if folder not in missing:
                    folder.mkdir(exist_ok=True)
                remove_empty(missing[1:])
            if isinstance(error, OSError) and error.errno in FULL:
                raise cant_write(folder, error) from None
            raise
    finally:
        os.close(lock)


def take(lock: int, folder: Path) -> None:
    """Take the lock of an open folder. Raises InputError, which names the owner, if somebody else has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{shown(folder)} is in use by {owner(lock)}: wait for it to end, or {ELSEWHERE}") from None
    except OSError:  # a file system without locks
        return


def owner(lock: int) -> str:
    """Return which process has the lock of an open folder, in words, as far as this machine tells."""
    inode = os.fstat(lock).st_ino
    try:
        lines = Path("/proc/locks").read_text("ascii").splitlines()
        found = [re.search(rf"FLOCK .* (\d+) \S+:{inode} ", line) for line in lines]
        pid = next(match[1] for match in found if match is not None)
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except (OSError, StopIteration):
        return "another process"
    words = " ".join(Path(word).name if number < 2 else word for number, word in enumerate(command) if word)
    return f"process {pid} ({shown(words[:100])})"


def unfinished(path: Path) -> Path:
    """Return where a file is written before it is moved to its place whole."""
    return path.with_name(f".{path.name}.part") if path.name else path


def remove_unfinished(folder: Path) -> None:
    """Remove the files that a killed owner of a folder left half-written; for the owner that comes after it."""
    for path in folder.rglob(".*.part"):
        if path.is_file() and path.with_name(path.name[1:].removesuffix(".part")).suffix in OURS:
            path.unlink(missing_ok=True)


def _results(folder: Path, ours: Collection[str]) -> bool:
    """Return whether a folder holds more than what says whose it is, and empty files and folders."""
    return any(path.is_file() and path.name not in ours and path.stat().st_size > 0 for path in folder.rglob("*"))
