"""The same random examples on every CI run, new ones on each run by hand; helpers that tests import by name; and the
order of the files, which workers are handed whole: what a file's fixtures make is made once.
"""

import contextlib
import gc
import os
import signal
import sys
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings

from engine.runtime import executor

gc.disable()  # until all is imported

# In a new environment no module is compiled yet. Workers that import all in one order would each compile all of it.
FIRST = (
    ("torch",),
    ("scipy.stats", "pandas", "transformers", "aiohttp", "tokenizers"),
    ("sympy", "pyarrow.parquet", "cli.main", "windtunnel.api", "simulator.cluster", "studies.pages.run"),
)
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    for name in FIRST[int(worker.removeprefix("gw")) % len(FIRST)]:
        with contextlib.suppress(ImportError):  # who needs it will say so
            import_module(name)

sys.path.append(str(Path(__file__).parent))  # `import checkpoints`: --import-mode=importlib leaves it out

# a script's background job ignores it, and so would every process that a test starts and interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers that share the cores would fight over them
os.environ.setdefault("RAY_ADDRESS", "local")  # tests run side by side: none may join the cluster of another
os.environ.setdefault("RAY_enable_worker_prestart", "0")  # they use one or two: no others are started in advance
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("hand", deadline=None)  # a shared machine stalls now and then
settings.load_profile("hand")
if os.environ.get("CI"):
    settings.load_profile("ci")

JOBS = ("cli.search_point", "studies.published.tasks", "windtunnel.measured", "windtunnel.plan_point")
_preload = forkserver.set_forkserver_preload


def _with_ranks(modules: list[str]) -> None:
    """One process forks all ranks and jobs of these tests: without torch in it each rank would import it, for 2 s."""
    first, last = ("engine.worker.rank_process", *JOBS), "engine.worker.preloaded"
    _preload([*first, *(module for module in modules if module not in (*first, last)), last])


forkserver.set_forkserver_preload = _with_ranks

# Before it serves, an engine looks for garbage once. Here it would look through all that pytest has, for 0.4 s a start.
executor.gc = SimpleNamespace(collect=lambda: 0, freeze=gc.freeze)


# The longest first, so that all workers end together; the others follow by name. One worker runs all of ENGINE: each
# that did would import transformers' models, for 3 s, and have a fork server with torch of its own, for 2 s.
ENGINE = (
    "engine_executors", "engine_failures", "cli_engine", "worker_model", "cli_serve", "gpu_engine", "serve_engine",
    "serve_simulated", "listening", "worker_weights",
)  # fmt: skip
LONGEST = (
    *ENGINE, "ray", "studies_sweep", "calibration_data", "predictor_calibration", "cli_simulate", "simulator_oracles",
    "studies_selfcheck", "studies_experiments", "truth", "python_api", "pages_in_a_browser", "prefix_caching_runs",
    "cli_profile", "plan", "hardening", "project", "engine_scheduler", "predictor_gemm", "profiler_importers",
    "measured", "studies_search", "studies_report", "operator_kinds", "profiler_selection", "sanity_estimates",
    "studies_record", "vllm_reference", "profiler_operators", "load_generator",
)  # fmt: skip
PLACES = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: PLACES.get(item.path.name, len(PLACES)))


def pytest_collection_finish() -> None:
    """What all tests share is never garbage: with the usual thresholds a worker looked for some for 7 s."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out whole files (--dist loadfile), and those of ENGINE as if they were one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "engine" if PLACES.get(Path(file).name, len(PLACES)) < len(ENGINE) else file

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None
