"""`windtunnel report`: write one page about a run, search, sweep, study or validation, or several side by side."""

from __future__ import annotations

from pathlib import Path

from engine.errors import InputError
from studies.pages.compare_record import kind_of
from studies.pages.report import write_page


def run(folders: list[Path], output: Path | None, standalone: bool = False) -> Path:
    """Write the page, and print and return its path."""
    for folder in folders:
        _check_folder(folder)
    path = write_page(folders, output, standalone)
    print(f"report: {path if len(folders) == 1 else path.absolute()}")  # several: beside none of the folders
    return path


def _check_folder(path: Path) -> None:
    """Raise InputError for a file, with the folder to give in its place if that is one of Windtunnel's."""
    if not path.is_file():
        return
    try:
        kind = kind_of(path.parent)
    except InputError:
        raise InputError(
            f"{path} is a file: give a folder that simulate, bench, search, study or validate has written"
        ) from None
    raise InputError(f"{path} is a file: give the folder of the {kind}, {path.parent}")
