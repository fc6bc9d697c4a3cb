"""What breaks while the engine runs is named, ends the run soon, and leaves no process behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import strange_ranks
import torch
from serving import Oracle, Served, serve

from engine.errors import InputError
from engine.executors import multiprocess
from engine.executors.in_process import InProcessExecutor
from engine.executors.multiprocess import MultiprocessExecutor, free_port
from engine.executors.start import start
from engine.results.recorder import Recorder
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import Result, WorkerError

SOON_S = 60.0  # no pace, but a hang: what waits for a rank that is gone waits for half an hour
CUTS = [(2, 1), (1, 2)]
KILLED = r"rank {} was killed by SIGKILL \(process \d+\)"
Launch = Callable[..., MultiprocessExecutor]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Starts an executor, of strange ranks if a function is given, and closes it at the end."""
    started: list[MultiprocessExecutor] = []

    def new(spec: EngineSpec, strange: Callable[..., None] | None = None) -> MultiprocessExecutor:
        if strange is not None:
            monkeypatch.setattr(multiprocess, "_run_rank", strange)
        started.append(MultiprocessExecutor(spec))
        assert len(rank_pids()) == spec.parallel.world_size
        return started[-1]

    yield new
    for executor in started:
        executor.close()
    assert rank_pids() == []


def processes() -> Iterator[tuple[int, str, int, int]]:
    """Id, state, parent's id and session of every process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, session = path.read_text("utf-8").rsplit(")", 1)[1].split()[:4]
            yield int(path.parent.name), state, int(parent), int(session)


def rank_pids() -> list[int]:
    """Ranks that this process has started and that are still there."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return sorted(pid for pid, state, parent, _ in processes() if parent == server and state != "Z")


@contextlib.contextmanager
def failure(kind: type[Exception], match: str) -> Iterator[None]:
    """What is done here fails that way, soon, and with all ranks gone."""
    began = time.perf_counter()
    with pytest.raises(kind, match=match):
        yield
    assert time.perf_counter() - began < SOON_S
    assert rank_pids() == []


# -- a rank is killed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tp", "pp", "victim"), [(2, 1, 1), (1, 2, 0)])  # starting, ranks do not differ by their cut
@pytest.mark.parametrize("death", [strange_ranks.dies_at_once, strange_ranks.dies_loading])
def test_killed_while_starting(
    death: Callable[..., None], tp: int, pp: int, victim: int, oracle: Oracle, launch: Launch
) -> None:
    with failure(WorkerError, KILLED.format(victim)):
        launch(oracle.engine_spec(tp, pp), partial(death, victim=victim))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("tp", "pp"), CUTS)
def test_killed_in_a_step(tp: int, pp: int, victim: int, oracle: Oracle, launch: Launch) -> None:
    executor = launch(oracle.engine_spec(tp, pp), partial(strange_ranks.dies_computing, victim=victim))
    recorder = Recorder(predicted=False)
    with failure(WorkerError, KILLED.format(victim)):
        serve(executor, oracle, stages=pp, counts=[9, 9, 1, 9, 9], recorder=recorder)
    recorder.close()
    assert recorder.requests()["request_id"].tolist() == [2]  # the one that was finished before


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("tp", "pp"), CUTS)
def test_killed_from_outside_in_a_run(tp: int, pp: int, victim: int, oracle: Oracle, launch: Launch) -> None:
    executor = launch(oracle.engine_spec(tp, pp))
    pid = rank_pids()[victim]
    recorder = Recorder(predicted=False)

    def kill(served: Served) -> None:
        if len(served.results) == 12:
            os.kill(pid, signal.SIGKILL)

    with failure(WorkerError, rf"rank {victim} was killed by SIGKILL \(process {pid}\)"):
        serve(executor, oracle, stages=pp, counts=[9, 9, 1, 9, 9], recorder=recorder, on_result=kill)
    recorder.close()
    assert 2 in recorder.requests()["request_id"]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("tp", "pp"), CUTS)
def test_killed_between_runs(tp: int, pp: int, victim: int, oracle: Oracle, launch: Launch) -> None:
    executor = launch(oracle.engine_spec(tp, pp))
    assert serve(executor, oracle, stages=pp).outputs == oracle.outputs
    pids = rank_pids()
    os.kill(pids[victim], signal.SIGKILL)
    wait_until(lambda: pids[victim] not in rank_pids())
    with failure(WorkerError, rf"rank {victim} was killed by SIGKILL \(process {pids[victim]}\)"):
        serve(executor, oracle, stages=pp)


def test_closing_when_a_rank_is_gone_does_not_wait_for_it(
    oracle: Oracle, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocess, "CLOSE_S", 10 * SOON_S)
    executor = launch(oracle.engine_spec(2, 1))
    pids = rank_pids()
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: pids[0] not in rank_pids())
    began = time.perf_counter()
    executor.close()
    assert time.perf_counter() - began < SOON_S
    assert rank_pids() == []


def wait_until(true: Callable[[], bool], limit_s: float = SOON_S) -> None:
    end = time.perf_counter() + limit_s
    while not true():
        assert time.perf_counter() < end
        time.sleep(0.01)


# -- a rank fails ------------------------------------------------------------------------------------------------------


ERROR = (
    strange_ranks.fails_computing,
    WorkerError,
    r"rank {} failed: Traceback(?s:.*)strange_ranks.py(?s:.*)strange num",
)
EXIT = (strange_ranks.exits_computing, WorkerError, r"rank {} ended with exit code 3 \(process \d+\)")
MEMORY = (strange_ranks.runs_out_of_memory, InputError, r"out of memory on rank {} while computing a batch: lower --")


@pytest.mark.parametrize(
    ("failure_of", "tp", "pp", "victim"),
    [
        *((ERROR, tp, pp, victim) for tp, pp in CUTS for victim in (0, 1)),
        *((other, *place) for other in (EXIT, MEMORY) for place in ((2, 1, 1), (1, 2, 0))),  # whom nobody waits for
    ],
)
def test_the_rank_that_failed_first_is_named(
    failure_of: tuple[Callable[..., None], type[Exception], str], tp: int, pp: int, victim: int,
    oracle: Oracle, launch: Launch,
) -> None:  # fmt: skip
    failing, kind, message = failure_of
    executor = launch(oracle.engine_spec(tp, pp), partial(failing, victim=victim))
    with failure(kind, message.format(victim)):
        serve(executor, oracle, stages=pp)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("failing", [strange_ranks.fails_computing, strange_ranks.exits_computing])
def test_it_is_named_though_all_failures_are_heard_of_at_once(
    failing: Callable[..., None], victim: int, oracle: Oracle, launch: Launch
) -> None:
    executor = launch(oracle.engine_spec(2, 1), partial(failing, victim=victim))
    wait = executor.wait

    def late(timeout: float | None) -> Result | None:
        if executor._launched[0] == strange_ranks.FATAL_STEP:
            wait_until(lambda: all(pipe.poll() for pipe in executor._pipes))
        return wait(timeout)

    executor.wait = late  # type: ignore[method-assign]
    with failure(WorkerError, rf"rank {victim} (failed: (?s:.*)strange numbers|ended with exit code 3)"):
        serve(executor, oracle)


def test_a_token_that_no_vocabulary_has_is_an_error_of_the_first_rank(oracle: Oracle, launch: Launch) -> None:
    executor = launch(oracle.engine_spec(1, 2))
    with failure(WorkerError, "(?s)rank 0 failed: Traceback.*IndexError"):
        serve(executor, oracle, stages=2, prompts=[[1, 2, 10**6]], counts=[3])


def test_truncated_weights_are_named(oracle: Oracle, launch: Launch, tmp_path: Path) -> None:
    for path in oracle.folder.iterdir():
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[: -len(content) // 3] if path.suffix == ".safetensors" else content)
    spec = oracle.engine_spec(2, 1)
    with failure(InputError, f"can't read {tmp_path}/model.safetensors .*cut short"):
        launch(replace(spec, folder=tmp_path))


@pytest.mark.parametrize(
    ("num_blocks", "flag"), [(None, "--gpu-memory-utilization 0.9"), (48, "--num-gpu-blocks-override 48")]
)
def test_running_out_of_a_gpus_memory_names_what_to_change(num_blocks: int | None, flag: str, oracle: Oracle) -> None:
    executor = start(oracle.engine_spec(num_blocks=num_blocks))
    assert isinstance(executor, InProcessExecutor)
    message = rf"on rank 0 while computing a batch: .*{flag} .*--max-num-batched-tokens 176.*\(Tried 2 GiB\.\)$"
    with pytest.raises(InputError, match=message), executor._runner._memory("computing a batch"):
        raise torch.OutOfMemoryError("Tried 2 GiB.\nAnd more.")
    executor.close()
    executor.close()


# -- ports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_is_named(address: str, oracle: Oracle, launch: Launch) -> None:
    with socket.socket() as listener:
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with failure(
            InputError, rf"port {port} can't be had \(Address already in use\): give another --distributed-port"
        ):
            launch(oracle.engine_spec(2, 1, port=port))


def test_a_port_can_be_used_again_at_once(oracle: Oracle, launch: Launch) -> None:
    spec = oracle.engine_spec(2, 1, port=free_port())
    launch(spec).close()
    executor = launch(spec)
    assert serve(executor, oracle).outputs == oracle.outputs
    executor.close()
    executor.close()


def listening_addresses(pids: list[int]) -> list[str]:
    """Addresses of the TCP sockets on which these processes listen, as the kernel writes them."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(descriptor.readlink()))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]


@pytest.mark.parametrize("given", [False, True])
def test_ranks_of_one_machine_listen_to_no_other(given: bool, oracle: Oracle, launch: Launch) -> None:
    executor = launch(oracle.engine_spec(2, 1, port=free_port() if given else None))
    addresses = listening_addresses(rank_pids())
    assert len(addresses) >= 1  # the store's; Gloo's sockets, if they still listen
    assert set(addresses) == {"0100007F"}  # 127.0.0.1
    assert serve(executor, oracle).outputs == oracle.outputs


# -- the driver's process ends -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def endless_engine(
    folder: Path, tp: int, pp: int, executor: str = "multiprocess"
) -> Iterator[tuple[subprocess.Popen[str], Callable[[], int]]]:
    """An engine in a process of its own, and how many processes there are of it and by it."""
    script = [
        sys.executable,
        str(Path(__file__).with_name("endless_engine.py")),
        str(folder),
        str(tp),
        str(pp),
        executor,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    driver = subprocess.Popen(script, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True)

    def members() -> list[int]:
        return [pid for pid, state, _, session in processes() if session == driver.pid and state != "Z"]

    try:
        yield driver, lambda: len(members())
    finally:
        for pid in members():
            os.kill(pid, signal.SIGKILL)
        driver.communicate()


@pytest.mark.parametrize(("tp", "pp"), CUTS)
def test_all_ranks_end_when_the_driver_is_killed(tp: int, pp: int, oracle: Oracle) -> None:
    with endless_engine(oracle.folder, tp, pp) as (driver, count):
        assert driver.stdout is not None and driver.stdout.readline() == "serving\n"
        assert count() > tp * pp
        driver.kill()
        wait_until(lambda: count() == 0)
        assert driver.communicate(timeout=SOON_S)[1] == ""


def test_all_of_ray_ends_when_the_driver_is_killed(oracle: Oracle) -> None:
    pytest.importorskip("ray")
    with endless_engine(oracle.folder, 1, 1, "ray") as (driver, count):
        assert driver.stdout is not None and driver.stdout.readline() == "serving\n"
        assert count() > 5
        driver.kill()
        wait_until(lambda: count() == 0)


@pytest.mark.parametrize(("tp", "pp", "serving"), [(1, 2, False), (2, 1, True)])
def test_ctrl_c_ends_all_processes_and_only_the_driver_speaks(tp: int, pp: int, serving: bool, oracle: Oracle) -> None:
    with endless_engine(oracle.folder, tp, pp) as (driver, count):
        if serving:
            assert driver.stdout is not None and driver.stdout.readline() == "serving\n"
        else:
            wait_until(lambda: count() > 2)  # the process that ranks are forked from has started
        os.killpg(driver.pid, signal.SIGINT)
        wait_until(lambda: count() == 0)
        errors = driver.communicate(timeout=SOON_S)[1]
        assert driver.returncode == -signal.SIGINT
        assert errors.rstrip().endswith("KeyboardInterrupt") and errors.count("Traceback") == 1
