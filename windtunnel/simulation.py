"""A simulation of resolved settings, in memory or into a run's folder: what the API and `windtunnel simulate` run.

simulation = Simulation.of(config)
simulation.write(Path("runs/first"), started=time.perf_counter())
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.results.recorder import Run
from engine.results.run_folder import run_folder, write_chrome_trace, write_config, write_summary
from engine.results.tables import to_numpy
from engine.workload.workload import Workload, make_workload
from simulator.cluster import Deployment, simulate
from studies.capacity.ranges import described, errors_in_words, intervals
from windtunnel.plugins import load_plugin
from windtunnel.run_config import resolved
from windtunnel.settings import FileConfig

Progress = Callable[[int], None]  # called with the number of finished requests


@dataclass(frozen=True, eq=False)
class Simulation:
    """A workload and the deployments that it goes to; `copies[i]` replicas of `kinds[i]`."""

    config: FileConfig
    kinds: list[Deployment]
    copies: list[int]
    workload: Workload

    @classmethod
    def of(cls, config: FileConfig) -> Simulation:
        """Load the plugins and resolve the settings. Raises InputError for what is impossible."""
        for plugin in config.plugin:
            load_plugin(plugin)
        groups = config.groups()
        config.slos()
        kinds = [Deployment.of(group.replica_spec(), group.predictor) for group in groups]
        shortest = min(kind.scheduler.max_model_len or 0 for kind in kinds)
        return cls(config, kinds, [group.count for group in groups], make_workload(config.workload_spec(shortest)))

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The settings as `config.yaml` holds them."""
        return resolved(self.config, [kind.replica for kind in self.kinds], len(self.workload))

    def run(self, folder: Path | None, *, started: float, on_progress: Progress | None = None) -> Run:
        """Simulate, with the tables written to `folder` if there is one. `started`: perf_counter at the beginning."""
        startup_seconds = time.perf_counter() - started
        deployments = [kind for kind, count in zip(self.kinds, self.copies, strict=True) for _ in range(count)]
        result = simulate(
            self.workload,
            deployments,
            router=self.config.router,
            seed=self.config.seed,
            slos=self.config.slos(),
            folder=folder,
            on_progress=on_progress,
            with_batches=True,
        )
        if self.config.uncertainty is not None:
            result.summary.update(self._intervals(self.config.uncertainty, on_progress))
        result.summary["version"] = version("windtunnel")
        result.summary["simulator"] |= {
            "startup_seconds": startup_seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        return result

    def _intervals(self, draws: int, on_progress: Progress | None) -> dict[str, Any]:
        """Return the ranges of the leading results over reruns with drawn errors, as the summary holds them."""
        summaries = []
        for seed in range(1, draws + 1):
            kinds = [kind.drawn(seed) for kind in self.kinds]
            deployments = [kind for kind, count in zip(kinds, self.copies, strict=True) for _ in range(count)]
            again = simulate(
                self.workload, deployments, router=self.config.router, seed=self.config.seed, slos=self.config.slos()
            )
            summaries.append(again.summary)
            if on_progress is not None:
                on_progress((seed + 1) * len(self.workload))
        return described(intervals(summaries), draws, [errors_in_words(kind) for kind in self.kinds])

    def write(
        self,
        target: Path,
        *,
        started: float,
        chrome_trace: bool = False,
        operator_times: bool = False,
        on_progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Simulate into the new folder `target`, with its report, and return the summary.

        With `operator_times` the summary has the run's time by kind of operator, in `operator_times_s`.
        """
        with run_folder(target) as folder:
            summary = self.run(folder, started=started, on_progress=on_progress).summary
            if operator_times:
                summary["operator_times_s"] = self._operator_times(folder)
            write_config(folder, self.resolved)
            write_summary(folder, summary)
            if chrome_trace:
                write_chrome_trace(folder)
            from studies.pages.run import write_report  # plotly takes longer to import than everything else

            write_report(folder)
        return summary

    def _operator_times(self, folder: Path) -> list[dict[str, float] | None]:
        """Return the seconds by family of each kind of replica; None for one without a calibration."""
        import pyarrow.parquet as pq

        from simulator.operator_times import COLUMNS, operator_times

        rows = to_numpy(pq.ParquetFile(folder / "iterations.parquet").read(["replica", *COLUMNS]))
        found, first = [], 0
        for kind, count in zip(self.kinds, self.copies, strict=True):
            mine = (rows["replica"] >= first) & (rows["replica"] < first + count)
            found.append(operator_times(kind, {name: rows[name][mine] for name in COLUMNS}))
            first += count
        return found
