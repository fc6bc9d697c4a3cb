"""One page from the folder of any run, search, sweep, study or validation, or from several side by side.

A run and a validation have pages of their own, which are written again; a study's is only copied. Runs and searches go
together (a search by the run at its capacity), searches and sweeps, and validations among themselves.

    windtunnel report runs/sarathi runs/vllm --output both.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import InputError
from engine.results.files import write_whole
from engine.results.folders import FULL
from studies.pages.capacity import capacities_page, search_page
from studies.pages.capacity_record import read_search, read_sweep
from studies.pages.compare import runs_page
from studies.pages.compare_record import Kind, kind_of, names_of, read_json, read_side, readable
from studies.pages.page import Page, library_beside, with_library
from studies.pages.plan import plan_page
from studies.pages.run import render
from studies.pages.validation import validation_page, validations_page

COMPARISON = Path("comparison.html")  # of several folders
_TOGETHER: tuple[set[Kind], ...] = ({"run", "search"}, {"search", "sweep"}, {"validation"})


def write_page(folders: Sequence[Path], output: Path | None = None, standalone: bool = False) -> Path:
    """Write the page of the folders to `output`, by default into the only folder, and return its path.

    The plot library goes beside it, or with `standalone` into it.

    Raises InputError for a folder that can't be read, folders that don't go together, and an output that is there
    already, unless it is the folder's own page.
    """
    kinds = {folder: kind_of(folder) for folder in folders}
    names = dict(zip(folders, names_of(folders), strict=True))
    if len(folders) > 1:
        _check_together(kinds)
    own = _own_page(folders[0], kinds[folders[0]]) if len(folders) == 1 else None
    of_ours = COMPARISON.is_file() and b"\xc2\xb7 Windtunnel</title>" in COMPARISON.read_bytes()
    if output is None and own is None and of_ours:
        own = COMPARISON  # made again
    path = _checked(output or own or COMPARISON, own)
    try:
        only = kinds[folders[0]] if len(folders) == 1 else None
        if only == "study":
            return _copy(_own_page(folders[0], only), path, standalone)
        with readable(Path(" and ".join(map(str, folders))), only or "comparison"):
            page = _page_of(folders[0], only) if only else _side_by_side(names, kinds)
        return page.write(path, standalone)
    except OSError as error:
        fix = f"{'free some space, or ' * (error.errno in FULL)}give another --output"
        raise InputError(f"can't write {path}: {error.strerror or error}: {fix}") from error


def _check_together(kinds: dict[Path, Kind]) -> None:
    for folder, kind in kinds.items():
        if kind in ("study", "plan"):
            raise InputError(f"{folder} is a {kind}, whose page stands alone ({_own_page(folder, kind)}): leave it out")
    if not any(set(kinds.values()) <= together for together in _TOGETHER):
        first = {kind: folder for folder, kind in reversed(kinds.items())}
        what = ", ".join(f"{first[kind]} (a {kind})" for kind in dict.fromkeys(kinds.values()))
        raise InputError(
            f"these can't be laid side by side: {what}. Runs go with runs and searches, sweeps with sweeps and "
            "searches, validations with validations"
        )


def _own_page(folder: Path, kind: Kind) -> Path:
    """Return the page that a folder has or gets."""
    page = folder / ("validation.html" if kind == "validation" else "report.html")
    if kind == "study" and not page.is_file():
        raise InputError(f"{folder} is an unfinished study: the same command again goes on with it")
    return page


def _checked(path: Path, own: Path | None) -> Path:
    if not path.absolute().parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to write {path.name} to: make it, or give another --output")
    if path.is_dir():
        raise InputError(f"{path} is a folder: give an --output file such as {path / 'report.html'}")
    if path.exists() and (own is None or path.resolve() != own.resolve()):
        raise InputError(f"{path} exists: give another --output")
    return path


def _page_of(folder: Path, kind: Kind) -> Page:
    name = folder.resolve().name
    if kind == "search":
        return search_page(read_search(folder, name))
    if kind == "sweep":
        return capacities_page([read_sweep(folder, name)], [])
    if kind == "validation":
        return validation_page(read_json(folder / "validation.json"))
    if kind == "plan":
        return plan_page(read_json(folder / "plan.json"))
    return render(read_side(folder, name).record)


def _copy(page: Path, path: Path, standalone: bool) -> Path:
    """Copy a page, which is as it was written, with the plot library beside it or in it."""
    with readable(page.parent, "study"):
        html = page.read_text(encoding="utf-8")
    beside = library_beside(html)
    if beside is not None and standalone:
        write_whole(path, with_library(html, page.with_name(beside)))
    elif path.resolve() != page.resolve():
        if beside is not None and path.parent.resolve() != page.parent.resolve():
            write_whole(path.with_name(beside), page.with_name(beside).read_text(encoding="utf-8"))
        write_whole(path, html)
    return path


def _side_by_side(names: dict[Path, str], kinds: dict[Path, Kind]) -> Page:
    if "validation" in kinds.values():
        return validations_page(names)
    searches = {name: read_search(folder, name) for folder, name in names.items() if kinds[folder] == "search"}
    if "sweep" in kinds.values():
        sweeps = [read_sweep(folder, name) for folder, name in names.items() if kinds[folder] == "sweep"]
        return capacities_page(sweeps, list(searches.values()))
    if len(searches) == len(names) and not any(search.best for search in searches.values()):
        return capacities_page([], list(searches.values()))
    places = {name: searches[name].best if name in searches else folder for folder, name in names.items()}
    sides = [read_side(place, name) for name, place in places.items() if place is not None]
    return runs_page(sides, searches)
