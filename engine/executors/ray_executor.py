"""The executor of ranks on the machines of a Ray cluster: an actor each, placed as close together as can be.

Joins the cluster that is running (RAY_ADDRESS, or one on this machine) or starts a local one. Ray is imported only
when this module is.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections import deque
from queue import SimpleQueue
from subprocess import Popen
from typing import TYPE_CHECKING, Any, NoReturn

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.errors import InputError
from engine.executors import ray_reaper
from engine.executors.multiprocess import BLAME_S, free_port
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import RankReport, Result, Step, WorkerError, combine, freeze_start_up
from engine.runtime.network import LOCALHOST, address_of, interface_of

if TYPE_CHECKING:
    from engine.worker.runner import Pending

REPORTS = "reports"  # the thread of an actor that waits for steps
PLACEMENT_S = 60.0  # to find room for every rank


class RankActor:
    """A rank in a Ray actor. Calls run one after the other, in the order they were made, but `report` beside them.

    So a step is launched while the one before is computed, as in a process of a rank.
    """

    def __init__(self, spec: EngineSpec, rank: int) -> None:
        self._spec, self._rank = spec, rank
        self._pending: SimpleQueue[Pending | Exception] = SimpleQueue()

    def process(self) -> int:
        """This actor's process id."""
        return os.getpid()

    def meeting_point(self) -> str:
        """Where the ranks may meet, on this actor's machine."""
        interface = self._spec.interface
        address = ray.util.get_node_ip_address() if interface is None else address_of(interface)
        return f"tcp://{address}:{self._spec.port or free_port()}"

    def join(self, meeting_point: str) -> tuple[int, str, str, bool]:
        """Become a rank. Returns what the runner's `describe` says."""
        from engine.worker.rank import join

        interface = self._spec.interface or interface_of(ray.util.get_node_ip_address())
        # Ray shows an actor its own GPU only
        self._runner = join(self._spec, self._rank, 0, meeting_point, interface)
        return self._runner.describe()

    def clock(self) -> tuple[str, float]:
        """This actor's machine and its clock, as `_clock` says them."""
        return _clock()

    def allocate(self, num_blocks: int) -> None:
        self._runner.allocate(num_blocks)
        freeze_start_up()

    def execute(self, step: Step) -> None:
        """Start a step, on a GPU without waiting for it."""
        try:
            self._pending.put(self._runner.execute(step))
        except Exception as error:
            self._pending.put(error)

    @ray.method(concurrency_group=REPORTS)  # type: ignore[untyped-decorator]
    def report(self) -> RankReport:
        """What came of the oldest step that has not been reported, once it is done. Raises what its start raised."""
        pending = self._pending.get()
        if isinstance(pending, Exception):
            raise pending
        return pending.wait()


class RayExecutor:
    """Starts the actors and speaks with them."""

    def __init__(self, spec: EngineSpec) -> None:
        self._started_ray = not ray.is_initialized()
        self._reaper: Popen[bytes] | None = None
        if self._started_ray:
            before = ray_reaper.descendants(os.getpid())
            os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # what fails is raised by `wait`
            os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 makes ranks give way to all that is running
            _init()
            _silence()
            self._reaper = ray_reaper.start(before)
        self._actors: list[Any] = []
        self._pids: list[int] = []
        self._launched: deque[list[Any]] = deque()
        self._group: Any = None
        try:
            what = "GPU" if spec.device == "cuda" else "CPU"
            ranks, together = spec.parallel.world_size, spec.parallel.tensor_parallel_size
            if max(node["Resources"].get(what, 0) for node in ray.nodes() if node["Alive"]) < together:
                together = 1  # a stage's ranks speak most with each other, but no machine holds them all
            while not self._placed(ranks // together, {what: together}):
                if together > 1:  # the machines have room, but not side by side
                    together = 1
                    continue
                raise InputError(
                    f"the Ray cluster has no room for {ranks} ranks of 1 {what} each (it has "
                    f"{ray.cluster_resources()}): add nodes, or lower --tensor-parallel-size"
                )
            self._actors = [self._actor(spec, rank, rank // together, what) for rank in range(ranks)]
            meeting_point = self._get([self._actors[0].meeting_point.remote()])[0]
            self._pids = self._get([actor.process.remote() for actor in self._actors])
            ready = self._get([actor.join.remote(meeting_point) for actor in self._actors])
            self.num_blocks: int = min(answer[0] for answer in ready)
            self.attention_backend: str = ready[0][1]
            self.hardware: str = ready[0][2]
            self.has_cuda_graphs: bool = ready[0][3]
            node, zero = _clock()
            clocks = self._get([actor.clock.remote() for actor in self._actors])
            self._shifts = [0.0 if there == node else of_rank - zero for there, of_rank in clocks]
            self._get([actor.allocate.remote(self.num_blocks) for actor in self._actors])
            freeze_start_up()
        except BaseException:
            self.close()
            raise

    def _placed(self, count: int, bundle: dict[str, int]) -> bool:
        """Whether there is room for so many bundles, each on one machine."""
        self._group = placement_group([bundle] * count, strategy="PACK")
        if self._group.wait(PLACEMENT_S):
            return True
        remove_placement_group(self._group)
        self._group = None
        return False

    def _actor(self, spec: EngineSpec, rank: int, bundle: int, what: str) -> Any:
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        options: dict[str, Any] = {"num_cpus": int(what == "CPU"), "num_gpus": int(what == "GPU")}
        actor: Any = ray.remote(concurrency_groups={REPORTS: 1})(RankActor)
        return actor.options(scheduling_strategy=place, **options).remote(spec, rank)

    def launch(self, step: Step) -> None:
        shared = ray.put(step)  # once, however many ranks
        for actor in self._actors:
            actor.execute.remote(shared)
        self._launched.append([actor.report.remote() for actor in self._actors])

    def wait(self, timeout: float | None) -> Result | None:
        if not self._finished(self._launched[0], timeout):
            return None
        reports = zip(ray.get(self._launched.popleft()), self._shifts, strict=True)
        return combine([_on_our_clock(report, shift) for report, shift in reports])

    def close(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        self._actors = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
        if self._started_ray:
            ray.shutdown()
            os.environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)
            ray._private.ray_constants.ENABLE_RAY_CLUSTER = True
        if self._reaper is not None:
            self._reaper.communicate()
            self._reaper = None
        gc.unfreeze()

    def _get(self, references: list[Any]) -> list[Any]:
        """The ranks' answers, which come in the order of `references`."""
        self._finished(references, None)
        answers: list[Any] = ray.get(references)
        return answers

    def _finished(self, references: list[Any], timeout: float | None) -> bool:
        """Whether the ranks' answers are there within `timeout` seconds. Raises if one of them is an error."""
        end = None if timeout is None else time.perf_counter() + timeout
        waiting = list(references)
        while waiting:  # one by one: a rank that died is heard of while the others wait for it
            left = None if end is None else max(0.0, end - time.perf_counter())
            done, waiting = ray.wait(waiting, num_returns=1, timeout=left)
            if not done:
                return False
            try:
                ray.get(done)
            except RayError:
                self._fail(references, references.index(done[0]))
        return True

    def _fail(self, references: list[Any], first: int) -> NoReturn:
        """Raise what went wrong: InputError if an actor found fault with the input, else WorkerError.

        Rank `first` was heard of first, but a rank that died makes the others fail.
        """
        errors: dict[int, RayError] = {}
        ray.wait(references, num_returns=len(references), timeout=BLAME_S)
        for rank in (first, *range(len(references))):
            try:
                ray.get(references[rank], timeout=0)
            except GetTimeoutError:
                continue
            except RayError as found:
                errors.setdefault(rank, found)
        for rank, error in errors.items():
            if isinstance(error, RayActorError):
                process = f" (process {self._pids[rank]})" if self._pids else ""
                why = str(error).splitlines()[0]  # the lines after it are advice on Ray
                raise WorkerError(f"rank {rank} died{process}: {why}") from None
        for error in errors.values():
            if isinstance(error, RayTaskError) and isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
        raise WorkerError(f"rank {first} failed: {errors[first]}") from None


def _init() -> None:
    """Join the Ray cluster that runs, or start one of this machine alone, which listens to no other machine."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if (address := os.environ.get("RAY_ADDRESS", "auto")) != "local":
        try:
            ray.init(address=address, **quiet)
            return
        except ConnectionError:
            if address != "auto":
                raise
    # as Ray does by itself on other systems; these names are private to it, and a test looks at what listens
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(address="local", include_dashboard=False, _node_ip_address=LOCALHOST, **quiet)


def _silence() -> None:
    """Stop Ray's thread that prints the cluster's errors on stdout: what breaks is raised here, in one line.

    `log_to_driver` does not stop it. These names are private to Ray; where they are others, it prints them too.
    """
    with contextlib.suppress(AttributeError):
        worker: Any = ray._private.worker.global_worker
        worker.threads_stopped.set()
        worker.gcs_error_subscriber.close()


def _clock() -> tuple[str, float]:
    """This process's machine in the cluster, and the wall-clock time at which its monotonic clock was 0.

    Each machine's monotonic clock has a zero of its own; wall clocks agree as far as they are kept in step (NTP).
    """
    return ray.get_runtime_context().get_node_id(), time.time() - time.perf_counter()


def _on_our_clock(report: RankReport, shift: float) -> RankReport:
    time = report.time
    return report._replace(time=time._replace(start=time.start + shift, end=time.end + shift))
