"""What runs on Ray: the engine's ranks, on this machine and on a cluster of two nodes, and the points of a search."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import strange_ranks
import sweep_work
import yaml
from command_line import windtunnel
from listening import LOOPBACK, descendants, listening
from serving import Oracle, assert_varied, serve

from engine.executors.start import start
from engine.runtime.executor import WorkerError
from studies.jobs.pool import work_off, work_off_on_ray
from windtunnel.planning import make_plan

ray: Any = None
SWEEP = {
    "model": "mistralai/Mistral-7B-v0.1", "device": "a100", "max_model_len": 4096, "num_prompts": 60,
    "slo": ["p99_tbt<=0.1", "p50_scheduling_delay<=2"],
    "sweep": {"scheduler": ["sarathi", "vllm"]},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _ray() -> None:
    """Import it where these tests run, and not where they are only collected: it takes half a second."""
    global ray
    ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes, of which the first alone has room for three ranks."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        folders = map(str, (Path(__file__).parent, Path(__file__).parents[1]))
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))  # of its workers, for sweep_work
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=2)
            yield cluster.address
        finally:
            cluster.shutdown()


def children() -> list[str]:
    """Names of this process's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, rest = path.read_text("utf-8").split("(", 1)[1].rsplit(")", 1)
            if int(rest.split()[1]) == os.getpid():
                found.append(name)
    return found


def test_ranks_give_the_tokens_listen_to_no_other_machine_and_are_gone_afterwards(
    oracle: Oracle, capfd: pytest.CaptureFixture[str]
) -> None:
    if (os.cpu_count() or 1) < 2:
        pytest.skip("ray grants each rank a processor")
    ours, before = listening([os.getpid()]), set(descendants(os.getpid()))
    mine = start(oracle.engine_spec(tp=2), "ray")
    try:
        found = listening([os.getpid(), *(set(descendants(os.getpid())) - before)]) - ours
        assert len(found) >= 2  # the rendezvous and the ranks, at least
        assert {address for address, _ in found} <= LOOPBACK
        served = serve(mine, oracle)
        assert_varied(served)
        assert served.outputs == oracle.outputs
        assert ray.is_initialized()
        ends = [time.end for result in served.results for time in result.times]
        mine._shifts = [0.0, 1e6]  # type: ignore[attr-defined]  # as if rank 1 were on a machine that started later
        shifted = [result.times for result in serve(mine, oracle).results]
        assert all(max(ends) < one.end < two.end - 0.9e6 for one, two in shifted)
        victim: Any = mine._actors[1]  # type: ignore[attr-defined]
        ray.cloudpickle.register_pickle_by_value(strange_ranks)  # which the actor can't import
        for actor in mine._actors:  # type: ignore[attr-defined]
            ray.get(actor.__ray_call__.remote(strange_ranks.slow_to_report))
        assert serve(mine, oracle, async_scheduling=True, counts=[2] * 5).outputs == [o[:2] for o in oracle.outputs]
        noted = ray.get(victim.__ray_call__.remote(strange_ranks.noted))
        assert noted[:4] == ["start", "start", "done", "start"]  # two are under way at any time
        pid = ray.get(victim.__ray_call__.remote(strange_ranks.pid))
        assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0)
        os.kill(pid, signal.SIGKILL)
        capfd.readouterr()
        with pytest.raises(WorkerError, match=rf"^rank 1 died \(process {pid}\): [^\n]*$"):
            serve(mine, oracle)
        time.sleep(2)  # for what Ray would have to say of it
    finally:
        mine.close()
    assert capfd.readouterr() == ("", "")
    assert not ray.is_initialized()
    assert not {"raylet", "gcs_server"} & set(children())
    mine.close()


def test_the_ranks_of_a_stage_share_a_machine_where_one_holds_them(oracle: Oracle, cluster: str) -> None:
    ray.init(address=cluster, log_to_driver=False)
    try:
        mine: Any = start(oracle.engine_spec(tp=2, pp=2), "ray")
        try:
            assert serve(mine, oracle, stages=2).outputs == oracle.outputs
            nodes = [node for node, _ in ray.get([actor.clock.remote() for actor in mine._actors])]
            assert nodes[0] == nodes[1] and nodes[2] == nodes[3] and nodes[0] != nodes[2]
        finally:
            mine.close()
    finally:
        ray.shutdown()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "sweep.json").read_text().replace(f"/{folder.name}/", "/")
    rows: list[dict[str, Any]] = json.loads(text)["points"]
    return rows


def test_a_search_on_a_cluster_is_that_of_processes(cluster: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    for name, where in (("here", ["--workers", "1"]), ("on-ray", ["--ray", cluster])):
        done = windtunnel("search", "--sweep", "sweep.yaml", "--gpu-price", "a100=2", "--seeds", "1", "--no-curve",
                          *where, "--output-dir", name, cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not ray.is_initialized()
    assert [row["status"] for row in rows_of(tmp_path / "here")] == ["done"] * 2
    assert rows_of(tmp_path / "here") == rows_of(tmp_path / "on-ray")


def test_a_plan_and_whatever_becomes_of_jobs_too(cluster: str, tmp_path: Path) -> None:
    every = [{"do": 3}, {"do": "refuse"}, {"do": "fail"}, {"do": 4}]
    small = {"model": "microsoft/phi-2", "workload": "fixed", "input_len": 200, "output_len": 5, "request_rate": 1,
             "num_prompts": 20, "slo": ["p99_ttft<=1"], "uncertainty": 2}  # fmt: skip
    one = {"tensor_parallel_size": [1], "pipeline_parallel_size": [1], "max_num_batched_tokens": [512]}
    ray.init(address=cluster, log_to_driver=False)  # once for both
    try:
        found = dict(work_off_on_ray(sweep_work.work, every, cluster))
        plans = [
            make_plan(small, ["a40"], {"": 1.0}, one, folder=tmp_path / f"plan-{address}", workers=1,
                      ray_address=address) for address in (cluster, None)
        ]  # fmt: skip
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    local = dict(work_off(sweep_work.work, every, 2))
    for each in (*found.values(), *local.values()):
        each.pop("traceback", None)
    assert found == local
    assert plans[0] | {"cpu_s": 0} == plans[1] | {"cpu_s": 0}
