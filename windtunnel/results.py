"""Results in Python: a run and a capacity search, as plain dicts and pandas DataFrames.

pandas is imported when the first DataFrame is asked for.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.documents import read_json, read_yaml
from engine.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from engine.results.recorder import Run as EngineRun

SEARCH_FILE = "search.json"
PLAN_FILE = "plan.json"
RUN_FILES = ("config.yaml", "summary.json", "requests.parquet", "iterations.parquet")


class Run:
    """A finished run, simulated or measured.

    Attributes:
        summary: what `summary.json` holds: latencies in ms, throughputs per s, SLOs, verdicts.
        config: the resolved settings, as `config.yaml` holds them.
        folder: where the run is on disk; None for a run in memory.
    """

    def __init__(
        self,
        summary: dict[str, Any],
        config: dict[str, Any],
        *,
        folder: Path | None = None,
        tables: EngineRun | None = None,
    ) -> None:
        self.summary = summary
        self.config = config
        self.folder = folder
        self._tables = tables

    @cached_property
    def requests(self) -> pd.DataFrame:
        """One row a request in the order they finished; times in s. docs/run-folder.md names the columns."""
        return self._table("requests")

    @cached_property
    def iterations(self) -> pd.DataFrame:
        """One row a batch and pipeline stage; times in s. docs/run-folder.md names the columns."""
        return self._table("iterations")

    def _table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        if self._tables is not None:
            return pd.DataFrame(getattr(self._tables, name))
        assert self.folder is not None, "a run is in memory or in a folder"
        return pd.read_parquet(self.folder / f"{name}.parquet")

    def __repr__(self) -> str:
        replicas = self.summary["replicas"]
        kinds = ", ".join(dict.fromkeys(f"{each['model']} on {each['device']}" for each in replicas))
        where = "" if self.folder is None else f", {self.folder}"
        return f"<Run: {self.summary['completed']:,} requests, {len(replicas)} x {kinds}{where}>"


class Search:
    """A finished capacity search.

    Attributes:
        summary: what `search.json` holds.
        folder: where the search is on disk; None for a search in memory.
    """

    def __init__(self, summary: dict[str, Any], *, folder: Path | None = None) -> None:
        self.summary = summary
        self.folder = folder

    @property
    def capacity(self) -> float:
        """The highest request rate (requests/s) at which every SLO holds; 0 if none does."""
        return float(self.summary["max_qps_under_slo"])

    @property
    def outcome(self) -> str:
        """ "found", "none" (no rate meets the SLOs) or "all" (every rate does; the capacity is the throughput)."""
        return str(self.summary["outcome"])

    @property
    def binding_slo(self) -> str | None:
        """The SLO that is missed above the capacity; None for the outcome "all"."""
        found: str | None = self.summary["binding_slo"]
        return found

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row a trial in the order they were made.

        Columns: rate (requests/s), met, margin (the worst value / threshold over the SLOs), binding_slo,
        stopped_early (the SLO that ended the trial before its end), folder.
        """
        import pandas as pd

        return pd.DataFrame(self.summary["trials"])

    def __repr__(self) -> str:
        return f"<Search: {self.summary['words']}>"


class Plan:
    """A finished plan.

    Attributes:
        summary: what `plan.json` holds.
        folder: where the plan is on disk; None for a plan in memory.
    """

    def __init__(self, summary: dict[str, Any], *, folder: Path | None = None) -> None:
        self.summary = summary
        self.folder = folder

    @property
    def best(self) -> dict[str, Any]:
        """The cheapest fleet that meets the SLOs: its replica's settings, replicas, prices and range of capacities.

        Where none does, the closest, whose "met" is False.
        """
        return dict(self.summary["best"])

    @cached_property
    def candidates(self) -> pd.DataFrame:
        """One row a candidate, the best first, with the keys of `best`; those without "met" cost at least as much."""
        import pandas as pd

        return pd.DataFrame(self.summary["candidates"])

    def __repr__(self) -> str:
        best = self.best
        fleet = f"{best['replicas']} replicas of {best['device']}, {best['gpus']} GPUs at ${best['usd_per_hour']:.4g}/h"
        return f"<Plan: {fleet if best['met'] else f'no fleet meets the SLOs; the closest is {fleet}'}>"


def read_folder(folder: Path) -> Run | Search | Plan:
    """Read a run's, a search's or a plan's folder. Raises InputError if it holds none, or is unfinished."""
    if not folder.is_dir():
        raise InputError(f"{folder} is {'a file' if folder.exists() else 'missing'}: give the folder of a run")
    if (folder / PLAN_FILE).is_file():
        return Plan(_json(folder / PLAN_FILE), folder=folder)
    if (folder / SEARCH_FILE).is_file():
        return Search(_json(folder / SEARCH_FILE), folder=folder)
    if missing := [name for name in RUN_FILES if not (folder / name).is_file()]:
        raise InputError(f"{folder} holds no finished run or search: it lacks {' and '.join(missing)}")
    config = read_yaml(folder / "config.yaml", "run it again")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.yaml'} holds no settings: run it again")
    return Run(_json(folder / "summary.json"), config, folder=folder)


def _json(path: Path) -> dict[str, Any]:
    found: Any = read_json(path, "it is damaged: run it again")
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object: run it again")
    return found
