"""The functions of the Python API. Imports that take time are inside them, so that `import windtunnel` is quick.

The keywords of `simulate` and `search` are the fields of `windtunnel.settings.FileConfig`, which the command line's
flags come from too.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_origin

from engine.errors import InputError
from windtunnel.messages import in_keywords
from windtunnel.names import unknown_setting
from windtunnel.settings import TOLERANCE, FileConfig, combined, load_file

if TYPE_CHECKING:
    from windtunnel.results import Plan, Run, Search

_FIELDS = FileConfig.model_fields
_Path = str | Path


def simulate(*, config: _Path | None = None, output_dir: _Path | None = None, **settings: Any) -> Run:
    """Simulate a deployment under a load, as `windtunnel simulate` does.

    Args:
        config: YAML file with any of the settings; keywords win.
        output_dir: new folder for the run and its report; None keeps the run in memory.
        **settings: the command's flags, with underscores: `model`, `device` and `request_rate` first of all;
            `windtunnel simulate --help` explains each. `replicas` takes groups of replicas as a config file does.

    Raises InputError for an unknown keyword or an impossible setting; the message names it and the fix.
    """
    started = time.perf_counter()
    with _in_keywords():
        from windtunnel.results import Run, read_folder
        from windtunnel.simulation import Simulation

        simulation = Simulation.of(_read(config, settings, ("config", "output_dir")))
        if output_dir is None:
            made = simulation.run(None, started=started)
            summary = json.loads(json.dumps(made.summary, allow_nan=False))  # as a folder has it
            return Run(summary, simulation.resolved, tables=made)
        simulation.write(Path(output_dir), started=started)
        found = read_folder(Path(output_dir))
        assert isinstance(found, Run)
        return found


def search(
    *,
    config: _Path | None = None,
    output_dir: _Path | None = None,
    tolerance: float = TOLERANCE,
    seeds: int | None = None,
    **settings: Any,
) -> Search:
    """Find the highest request rate at which every SLO holds, as `windtunnel search` does in the simulator.

    Args:
        config: YAML file with any of the settings; keywords win.
        output_dir: folder for the trials; the same search in the same folder resumes. None keeps it in memory.
        tolerance: the precision of the capacity, as a share of it.
        seeds: workloads to find the capacity for, for its range, without errors of the predicted times; 1: no range.
            Default: 4 draws of seeds and errors, or as many as `uncertainty` says.
        **settings: the command's flags, with underscores; `slo` is required, `request_rate` is the first guess.

    Raises InputError for an unknown keyword, an impossible setting, and settings that can't be searched with.
    """
    with _in_keywords():
        from studies.capacity.search import check_tolerance
        from windtunnel.capacity import Draws, open_search, read_search_file, search_capacity
        from windtunnel.results import SEARCH_FILE, Search

        check_tolerance(tolerance)
        read = _read(config, settings, ("config", "output_dir", "tolerance", "seeds"))
        Draws.of(read.uncertainty, seeds)
        folder = None if output_dir is None else Path(output_dir)
        if folder is None:
            return Search(search_capacity(read, tolerance, None, seeds=seeds))
        with open_search(folder, {"settings": read.model_dump(mode="json"), "tolerance": tolerance, "seeds": seeds}):
            if (folder / SEARCH_FILE).is_file():  # finished
                return Search(read_search_file(folder / SEARCH_FILE), folder=folder)
            return Search(search_capacity(read, tolerance, folder, seeds=seeds), folder=folder)


def plan(
    *,
    devices: str | Sequence[str],
    gpu_price: str | float | Mapping[str, float],
    config: _Path | None = None,
    output_dir: _Path | None = None,
    exhaustive: bool = False,
    workers: int | None = None,
    **settings: Any,
) -> Plan:
    """Find the cheapest fleet that meets the SLOs at a request rate, as `windtunnel plan` does.

    Args:
        devices: names to choose from, or paths as `device` takes them.
        gpu_price: dollars per GPU-hour: of any device, or by device.
        config: YAML file with any of the settings; keywords win.
        output_dir: folder for the results; the same plan in the same folder resumes. None keeps it in memory.
        exhaustive: size every point, also those that bounds dismiss.
        workers: number of processes. Default: 1, this one.
        **settings: the command's flags, with underscores; `model`, `request_rate` and `slo` are required. Parallel
            sizes, `engine`, `quantization`, `max_num_batched_tokens` and `max_num_seqs` may be lists.

    Raises InputError for an unknown keyword, an impossible setting, and settings that can't be planned with.
    """
    with _in_keywords():
        from windtunnel.planning import given_axes, listed, make_plan
        from windtunnel.prices import prices
        from windtunnel.results import Plan
        from windtunnel.settings import read_file

        for name in settings:
            if name not in _FIELDS:
                raise unknown_setting("keyword", name, (*_FIELDS, "devices", "gpu_price", "output_dir", "exhaustive"))
        values = {} if config is None else read_file(Path(config))
        values |= {name: _plain(name, value) for name, value in settings.items() if value is not None}
        axes, chosen = given_axes(values), listed("devices", devices)
        known = prices(gpu_price, chosen)

        def make(folder: Path) -> dict[str, Any]:
            return make_plan(values, chosen, known, axes, folder=folder, workers=workers or 1, bounds=not exhaustive)

        if output_dir is not None:
            return Plan(make(Path(output_dir)), folder=Path(output_dir))
        with TemporaryDirectory(prefix="windtunnel-plan-") as folder:
            return Plan(make(Path(folder)))


def load(folder: _Path) -> Run | Search | Plan:
    """Load a finished run's folder (of `simulate` or `bench`), a search's or a plan's.

    Raises InputError if the folder holds none.
    """
    from windtunnel.results import read_folder

    return read_folder(Path(folder))


def _read(config: _Path | None, keywords: dict[str, Any], own: Sequence[str]) -> FileConfig:
    """Return the settings of a file and keywords. Raises InputError for an unknown one."""
    for name in keywords:
        if name not in _FIELDS:
            raise unknown_setting("keyword", name, (*_FIELDS, *own))
    given = {name: _plain(name, value) for name, value in keywords.items() if value is not None}
    path = None if config is None else Path(config)
    values = load_file(path, FileConfig)
    if "replicas" in given:  # as in a file, where the other settings are what the groups share
        return combined(values | given, {}, "the keywords", FileConfig)
    return combined(values, given, str(path), FileConfig)


def _plain(name: str, value: Any) -> Any:
    """Return a keyword's value as the settings take it: paths as text, one value of a list as a list of it."""
    if get_origin(_FIELDS[name].annotation) is list and isinstance(value, str | Path):
        value = [value]
    return str(value) if isinstance(value, Path) else value


@contextmanager
def _in_keywords() -> Iterator[None]:
    """Name settings by their keywords in errors, which name the flags."""
    try:
        yield
    except InputError as error:
        message = in_keywords(str(error))
        raise (error if message == str(error) else InputError(message)) from error.__cause__


def _with_settings(function: Callable[..., Any]) -> None:
    """Give a function the settings in its signature, with their defaults, for `help` and editors."""
    own = [
        parameter for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]  # fmt: skip
    settings = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.get_default(call_default_factory=True),
            annotation=field.annotation,
        )
        for name, field in _FIELDS.items()
    ]
    returned = inspect.signature(function).return_annotation
    function.__signature__ = inspect.Signature([*settings, *own], return_annotation=returned)  # type: ignore[attr-defined]


for _function in (simulate, search):
    _with_settings(_function)
