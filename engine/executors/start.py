"""Starts the ranks of a replica: in this process, in processes of their own, or as actors of a Ray cluster.

executor = start(EngineSpec.of(resolve(folder, "cpu"), folder=Path(folder)), "in_process")
"""

from __future__ import annotations

from importlib.util import find_spec

from engine.errors import InputError, unknown
from engine.runtime.engine_spec import EXECUTORS, EngineSpec
from engine.runtime.executor import Executor


def start(spec: EngineSpec, executor: str | None = None) -> Executor:
    """Start the ranks and wait until they are ready. None takes one process where one rank is enough.

    Raises InputError for what can't be (weights that are not there, a model too big, ...), WorkerError for what breaks.
    """
    need("torch", "engine")
    name = executor or ("in_process" if spec.parallel.world_size == 1 else "multiprocess")
    if name == "in_process":
        if spec.parallel.world_size > 1:
            raise InputError(f"executor 'in_process' runs one rank, {spec.parallel} has {spec.parallel.world_size}: "
                             "use multiprocess or ray")  # fmt: skip
        from engine.executors.in_process import InProcessExecutor

        return InProcessExecutor(spec)
    if name == "multiprocess":
        from engine.executors.multiprocess import MultiprocessExecutor

        return MultiprocessExecutor(spec)
    if name == "ray":
        need("ray", "cluster")
        from engine.executors.ray_executor import RayExecutor

        return RayExecutor(spec)
    raise unknown("executor", name, EXECUTORS)


def need(package: str, extra: str) -> None:
    """Raise InputError if a package that Windtunnel brings in an extra is not installed."""
    if find_spec(package) is None:
        raise InputError(f"this needs the package {package}, which is not installed: pip install -e '.[{extra}]'")
