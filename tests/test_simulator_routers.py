"""Routers that look at the KV cache, at prompts and at sessions: where requests go, and what the caches gain."""

import numpy as np
import pytest

from engine.results.recorder import Recorder, Run
from engine.results.tables import Array
from engine.runtime.sequences import Sequence
from engine.scheduling.request import Request
from engine.server.live import Channel
from engine.specs import SchedulerSpec
from engine.workload.workload import Workload, WorkloadSpec, make_workload
from simulator.cluster import Deployment, deploy, simulate
from simulator.live import LiveCluster
from simulator.predictor.base import FixedTable

CHAT = WorkloadSpec(
    lengths="uniform", input_len="50:200", output_len="10:40", turns="2:6", system_prompt_len=64, think_time_s=0.5,
    request_rate=8.0, num_prompts=600, max_model_len=4096, seed=3,
)  # fmt: skip


def replica(**more: object) -> Deployment:
    spec = SchedulerSpec(policy="vllm", max_model_len=4096, max_num_batched_tokens=512, enable_prefix_caching=True)
    table = FixedTable([[0.0, *(0.004 + 0.0001 * tokens for tokens in range(1, 600))]])
    return deploy("microsoft/phi-2", "a100", scheduler=spec, num_gpu_blocks_override=1200, predictor=table, **more)  # type: ignore[arg-type]


def column(run: Run, name: str) -> Array:
    """A column of a run's requests by their ids."""
    order = np.argsort(np.asarray(run.requests["request_id"]))
    return np.asarray(run.requests[name])[order]


def test_a_session_stays_where_it_began_and_finds_its_prefix_there() -> None:
    chat = make_workload(CHAT)
    assert chat.after is not None
    sticky = simulate(chat, [replica()] * 4, router="session_affinity")
    where = column(sticky, "replica")
    later = np.flatnonzero(chat.after >= 0)
    assert len(later) > 300
    assert (where[later] == where[later - 1]).all()
    assert np.bincount(where, minlength=4).min() > 90  # and the sessions are spread
    spread = simulate(chat, [replica()] * 4, router="round_robin")
    assert sticky.summary["prefix_hit_rate"] > spread.summary["prefix_hit_rate"] + 0.2


def test_prefix_aware_routing_finds_most_of_the_prefixes_within_its_load_bound() -> None:
    chat = make_workload(CHAT)
    aware = simulate(chat, [replica()] * 4, router="prefix_aware")
    spread = simulate(chat, [replica()] * 4, router="round_robin")
    assert aware.summary["prefix_hit_rate"] > spread.summary["prefix_hit_rate"] + 0.1
    assert np.bincount(column(aware, "replica"), minlength=4).min() > 60


def test_one_popular_prompt_does_not_overload_its_replica() -> None:
    """400 requests with one system prompt, faster than a replica serves them: the bound spreads them."""
    spec = WorkloadSpec(
        lengths="fixed", input_len="10", output_len="20", turns="1", system_prompt_len=512, request_rate=400.0,
        num_prompts=400, max_model_len=4096,
    )  # fmt: skip
    run = simulate(make_workload(spec), [replica()] * 4, router="prefix_aware")
    assert np.bincount(column(run, "replica"), minlength=4).max() < 150


def test_kv_aware_routing_evens_out_the_use_of_the_cache() -> None:
    """One request in four is long: by turns they all meet on one replica, whose cache they fill."""
    prompts = np.where(np.arange(200) % 4 == 0, 2000, 50)
    load = Workload("every fourth is long", np.arange(200) * 0.06, prompts, np.full(200, 40), 0)
    peaks = {}
    for router in ("round_robin", "kv_aware"):
        run = simulate(load, [replica()] * 4, router=router)
        peaks[router] = max(each["peak_kv_utilization"] for each in run.summary["replicas"])
    assert peaks["kv_aware"] < 0.7 * peaks["round_robin"]


@pytest.mark.parametrize("router", ["kv_aware", "prefix_aware", "session_affinity"])
def test_a_router_gives_the_same_run_again(router: str) -> None:
    first, second = (simulate(make_workload(CHAT), [replica()] * 3, router=router) for _ in range(2))
    assert column(first, "last_token_s").tolist() == column(second, "last_token_s").tolist()


@pytest.mark.parametrize(
    ("router", "same"), [("session_affinity", True), ("prefix_aware", True), ("kv_aware", False)]
)  # fmt: skip
def test_a_served_cluster_routes_by_prompts_and_caches_too(router: str, same: bool) -> None:
    """Two requests with the same prompt, the second while the first is there."""
    kind = replica()
    cluster = LiveCluster([kind] * 3, Recorder(), router=router)
    cluster._origin = 0.0
    places = []
    for number in range(2):
        request = Request(number, 0.0, 64, 20)
        cluster.submit(Sequence(request, range(64)), Channel(), 0, 0.05 * number)
        places.append(cluster._at[number])
    assert (places[0] is places[1]) == same
    assert places[0].kv_load > 0 and places[0].outstanding_requests == 1 + same
