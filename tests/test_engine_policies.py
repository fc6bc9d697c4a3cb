"""Each policy on schedules worked out by hand from its definition.

A batch is written as who is in it: `A` decodes one token, `A5` computes five tokens of its prompt (or recomputes
them). Each request is `name: (prompt tokens, output tokens)`, and its first output token comes with its last prompt
token. Batches take equal times; those that complete while others wait do so oldest first.
"""

import string
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.errors import InputError
from engine.scheduling.policies import POLICIES, chunk_sizes, resolve
from engine.scheduling.request import Batch, Request
from engine.scheduling.scheduler import Scheduler
from engine.specs import SchedulerSpec

PLENTY = 1000


def play(
    policy: str,
    jobs: dict[str, tuple[int, int]],
    arrive: dict[str, int] | None = None,
    blocks: int = PLENTY,
    depth: int = 1,
    hashes: dict[str, list[int]] | None = None,
    priorities: dict[str, int] | None = None,
    **limits: object,
) -> tuple[list[str], Scheduler]:
    """The batches, in order. A request in `arrive` comes once so many batches have completed; the others at once."""
    limits = {"max_model_len": 30, "block_size": 1, "watermark": 0.0, "max_num_seqs": 10, **limits}
    spec = resolve(SchedulerSpec(policy=policy, **limits), 30)  # type: ignore[arg-type]
    scheduler = Scheduler(spec, blocks, depth)
    requests = {
        name: Request(
            string.ascii_uppercase.index(name), 0.0, *job, (hashes or {}).get(name), (priorities or {}).get(name, 0)
        )
        for name, job in jobs.items()
    }
    to_come = sorted(requests, key=lambda name: (arrive or {}).get(name, 0))
    written: list[str] = []
    flying: list[Batch] = []
    left, completed = len(jobs), 0
    while left:
        while to_come and (arrive or {}).get(to_come[0], 0) <= completed:
            scheduler.add(requests[to_come.pop(0)])
        while (batch := scheduler.schedule()) is not None:
            flying.append(batch)
            names = [letter(r) for r in batch.decodes] + [f"{letter(r)}{chunk}" for r, chunk in batch.chunks]
            written.append(" ".join(names))
            assert len(flying) <= depth
        batch = flying.pop(0)
        left -= len(scheduler.commit(batch)[0])
        completed += 1
    return written, scheduler


def letter(request: Request) -> str:
    return string.ascii_uppercase[request.id]


# -- one policy after the other ----------------------------------------------------------------------------------------


def test_sarathi_fills_the_budget_with_chunks_beside_the_decodes() -> None:
    batches, _ = play(
        "sarathi", {"A": (8, 3), "B": (3, 2), "C": (10, 1)}, arrive={"C": 2}, max_num_batched_tokens=6, max_num_seqs=4
    )
    assert batches == [
        "A6",  # nothing decodes: 6 of A's 8
        "A2 B3",  # the rest of A first, then B whole: 5 of 6
        "A B C4",  # two decodes leave 4 for C
        "A C5",  # B has its two tokens
        "C",  # one token of C's prompt is left: it runs like a decode
    ]


def test_sarathi_finishes_prompts_before_it_admits_new_ones() -> None:
    batches, _ = play("sarathi", {"A": (7, 1), "B": (7, 1), "C": (2, 1)}, max_num_batched_tokens=5, max_num_seqs=3)
    assert batches == ["A5", "A2 B3", "B4 C1", "C"]


def test_vllm_fills_the_budget_running_requests_first() -> None:
    batches, _ = play(
        "vllm", {"A": (8, 3), "B": (3, 2), "C": (10, 1)}, arrive={"C": 2}, max_num_batched_tokens=6, max_num_seqs=4
    )
    assert batches == ["A6", "A2 B3", "A B C4", "A C5", "C"]


OLD, NEW = {"vllm_version": "0.15"}, {"vllm_version": "0.33"}


@pytest.mark.parametrize(
    ("version", "batches", "recomputed"),
    [
        (OLD, ["A4", "A B3", "A", "B4", "B4"], 3),  # B's first 3 tokens take the last 2 blocks; then it needs a third
        (NEW, ["A4", "A", "A", "B4", "B4"], 0),  # 2 blocks are free, B's whole prompt takes 4
        ({**NEW, "scheduler_reserve_full_isl": False}, ["A4", "A B3", "A", "B4", "B4"], 3),
    ],
)
def test_vllm_admits_by_the_first_chunk_or_the_whole_prompt(
    version: dict[str, object], batches: list[str], recomputed: int
) -> None:
    limits = {"block_size": 2, "blocks": 5, "max_num_batched_tokens": 4, "max_num_seqs": 2}
    played, scheduler = play("vllm", {"A": (4, 3), "B": (8, 1)}, **limits, **version)
    assert (played, scheduler.recomputed_tokens) == (batches, recomputed)


@pytest.mark.parametrize("version", [OLD, NEW])
def test_vllm_preempts_the_last_admitted_and_admits_nobody_then(version: dict[str, object]) -> None:
    jobs = {"A": (3, 4), "B": (3, 3), "C": (1, 1)}
    batches, scheduler = play("vllm", jobs, {"C": 2}, block_size=2, blocks=5, **version)
    assert batches == [
        "A3 B3",  # two blocks each, one is left
        "A B",  # four tokens each: their blocks are full
        "A",  # A takes the last block, B gives up its own; C, which has come, would have fitted
        "A",  # B, now first in line, needs 3 blocks for 5 tokens; 2 are free, and C does not overtake it
        "B5 C1",
    ]
    assert scheduler.recomputed_tokens == 4


def test_vllm_has_several_prompts_part_way_with_a_threshold() -> None:
    jobs = {"A": (5, 2), "B": (4, 1)}
    limits = {"max_num_batched_tokens": 12, "long_prefill_token_threshold": 2}
    for version in (OLD, NEW):  # entries are in order of admission, so the decodes are not apart
        assert play("vllm", jobs, **limits, **version)[0][:2] == ["A2 B2", "A2 B2"]
    assert play("vllm", {"A": (5, 2)}, **limits, **OLD)[0] == ["A2", "A2", "A1", "A1"]
    assert play("vllm", {"A": (5, 2)}, **limits, **NEW)[0] == ["A5", "A"]  # nobody else is there
    # with one more in the queue there are 3, which get 4 tokens each
    jobs = {"A": (6, 2), "B": (5, 1), "C": (6, 1)}
    adaptive = {"long_prefill_token_threshold_adaptive": True, "max_num_seqs": 2}
    assert play("vllm", jobs, **limits, **NEW, **adaptive)[0] == ["A4 B4", "A2 B1", "A1 C6"]


@pytest.mark.parametrize("version", [OLD, NEW])
def test_vllm_by_priority_admits_the_most_urgent_first(version: dict[str, object]) -> None:
    batches, _ = play(
        "vllm", {"A": (2, 2), "B": (2, 1), "C": (2, 2), "D": (2, 1)}, {"D": 2}, max_num_seqs=1,
        scheduling_policy="priority", priorities={"A": 1, "C": -1, "D": 0}, **version,
    )  # fmt: skip
    assert batches == ["C2", "C1", "B2", "D2", "A2", "A1"]  # B is before D, as urgent and come later


@pytest.mark.parametrize("version", [OLD, NEW])
def test_vllm_by_priority_preempts_the_least_urgent_itself_too(version: dict[str, object]) -> None:
    batches, scheduler = play(
        "vllm", {"A": (4, 6), "B": (3, 4)}, {"B": 1}, block_size=2, blocks=5, scheduling_policy="priority",
        priorities={"A": 1}, **version,
    )  # fmt: skip
    assert batches == [
        "A4",
        "A1 B3",  # A takes a third block and B two: none is free
        "A1 B1",
        "B1",  # A needs a fourth block and goes itself, though it was there first; B, behind it, has its blocks
        "B1",  # A's 7 tokens need 4 blocks, 2 are free
        "A7",
        "A1",
        "A1",
    ]
    assert scheduler.recomputed_tokens == 6


@pytest.mark.parametrize("version", [OLD, NEW])
def test_vllm_by_priority_takes_back_what_it_had_planned(version: dict[str, object]) -> None:
    batches, scheduler = play(
        "vllm", {"A": (3, 6), "B": (2, 5)}, {"B": 1}, block_size=2, blocks=4, scheduling_policy="priority",
        priorities={"A": 1}, **version,
    )  # fmt: skip
    assert batches == [
        "A3",
        "A1 B2",  # two blocks and one
        "B1",  # A had taken the last block for its fifth token; B needs it, and is more urgent
        "B1",
        "B1",
        "B1",
        "A5",
        "A1",
        "A1",
        "A1",
    ]
    assert scheduler.recomputed_tokens == 4


def test_vllm_shares_a_prefix_within_a_batch() -> None:
    jobs, same = {"A": (6, 1), "B": (6, 1), "C": (7, 1)}, [1, 2, 3]
    caching = {"block_size": 2, "hashes": {"A": same, "B": same, "C": same}, "enable_prefix_caching": True}
    # B computes its last whole block again, for the last token is computed in any case; C has a seventh token
    assert play("vllm", jobs, blocks=12, **caching)[0] == ["A6 B2 C1"]
    assert play("sarathi", jobs, blocks=12, **caching)[0] == ["A6 B6 C7"]  # once they are computed, not before
    assert play("sarathi", jobs, {"B": 1, "C": 2}, blocks=12, **caching)[0] == ["A6", "B2", "C1"]
    # of 4 blocks A has 3 and B the fourth, beside 2 of A's; C would need a block of its own
    assert play("vllm", jobs, blocks=4, **caching)[0] == ["A6 B2", "C1"]


def test_vllm_v0_runs_whole_prompts_first_and_decodes_wait() -> None:
    batches, _ = play(
        "vllm_v0",
        {"A": (5, 3), "B": (4, 2), "C": (6, 2), "D": (2, 1)},
        arrive={"D": 2},
        max_num_batched_tokens=12,
        max_num_seqs=3,
    )
    assert batches == [
        "A5 B4",  # C's 6 would make 15
        "C6",  # A and B stall
        "A B C",  # D has to wait for a seat
        "D2",  # B and C are gone; A stalls once more
        "A",
    ]


def test_vllm_v0_does_not_look_past_a_prompt_that_does_not_fit() -> None:
    batches, _ = play("vllm_v0", {"A": (5, 1), "B": (6, 1), "C": (2, 1)}, max_num_batched_tokens=8, max_num_seqs=4)
    assert batches == ["A5", "B6 C2"]


def test_orca_puts_whole_prompts_beside_decodes_and_reserves_the_longest_length() -> None:
    jobs, arrive = {"A": (5, 3), "B": (4, 2), "C": (6, 1)}, {"C": 1}
    cache = {"block_size": 5, "max_model_len": 15, "blocks": 6}  # a reservation of 15 tokens takes 3 of 6 blocks
    assert play("orca", jobs, arrive, **cache)[0] == ["A5 B4", "A B", "A C6"]
    assert play("hybrid_only", jobs, arrive, **cache)[0] == ["A5 B4", "A B C6", "A"]  # its own tokens would have fitted
    assert play("orca", jobs, arrive, **{**cache, "blocks": 9})[0] == ["A5 B4", "A B C6", "A"]


def test_request_level_runs_a_batch_to_its_end() -> None:
    batches, _ = play("request_level", {"A": (5, 4), "B": (4, 2), "C": (6, 2)}, arrive={"C": 1}, max_num_seqs=3)
    assert batches == ["A5 B4", "A B", "A", "A", "C6", "C"]


def test_request_level_keeps_groups_apart_in_a_pipeline() -> None:
    batches, _ = play("request_level", {"A": (5, 4), "B": (4, 2), "C": (6, 2)}, arrive={"C": 1}, depth=2)
    assert batches == ["A5 B4", "A B", "C6", "A", "C", "A"]


def test_chunked_only_takes_turns() -> None:
    batches, _ = play(
        "chunked_only",
        {"A": (8, 3), "B": (3, 3), "C": (10, 2)},
        arrive={"C": 2},
        max_num_batched_tokens=6,
        max_num_seqs=4,
    )
    assert batches == [
        "A6",
        "A2",  # nothing can decode yet; a batch that goes on with a prompt takes no new one
        "A",
        "B3 C3",  # a decode never shares its batch
        "A B",
        "C6",
        "B C",  # what is left of C is one token
        "C",
    ]


def test_hybrid_only_puts_whole_prompts_beside_decodes_within_the_budget() -> None:
    batches, _ = play("hybrid_only", {"A": (5, 3), "B": (4, 2), "C": (12, 1)}, max_num_batched_tokens=8)
    assert batches == [
        "A5",  # B would make 9
        "A B4",
        "A B C12",  # C never fits, so it joins as the only prompt
    ]


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["sarathi", "vllm", "vllm_v0", "orca", "hybrid_only"])
def test_no_more_than_max_num_seqs_run(policy: str) -> None:
    jobs = {"A": (2, 3), "B": (2, 2), "C": (2, 1)}
    after = {"vllm_v0": ["C2", "A"]}.get(policy, ["A C2"])
    assert play(policy, jobs, max_num_batched_tokens=40, max_num_seqs=2)[0] == ["A2 B2", "A B", *after]
    assert play(policy, jobs, max_num_batched_tokens=40, max_num_seqs=3)[0] == ["A2 B2 C2", "A B", "A"]


def test_admission_leaves_the_watermark_free_and_nobody_jumps_the_queue() -> None:
    jobs = {"A": (8, 2), "B": (6, 1), "C": (4, 1), "D": (2, 1)}  # 4, 3, 2 and 1 blocks of 10
    limits = {"block_size": 2, "blocks": 10, "max_model_len": 12}
    assert play("vllm_v0", jobs, **limits)[0] == ["A8 B6 C4 D2", "A"]
    # 3 blocks are left after A and B; C's 2 would leave 1 of the 2 that stay free. D's 1 would do, but C is before it
    assert play("vllm_v0", jobs, watermark=0.2, **limits)[0] == ["A8 B6", "C4 D2", "A"]
    for policy in ("sarathi", "vllm"):
        assert play(policy, jobs, watermark=0.2, max_num_batched_tokens=40, **limits)[0] == ["A8 B6", "A C4 D2"]


def test_sarathi_pipeline_has_a_request_in_one_batch_at_a_time() -> None:
    batches, _ = play("sarathi", {"A": (6, 2), "B": (4, 2)}, depth=2, max_num_batched_tokens=4, max_num_seqs=4)
    assert batches == ["A4", "B4", "A2", "B", "A"]


def test_a_pipeline_of_three_has_three_batches_in_flight() -> None:
    batches, _ = play(
        "sarathi", {"A": (2, 3), "B": (2, 3), "C": (2, 3), "D": (2, 2)}, depth=3, max_num_batched_tokens=2,
        max_num_seqs=2,
    )  # fmt: skip
    # two seats only: C waits for one, although a stage of the pipeline is free
    assert batches == ["A2", "B2", "A", "B", "A", "B", "C2", "D2", "C", "D", "C"]


# -- preemption --------------------------------------------------------------------------------------------------------


def test_vllm_v0_recomputes_a_preempted_request_whole() -> None:
    batches, scheduler = play("vllm_v0", {"A": (3, 4), "B": (3, 3)}, block_size=2, blocks=5, max_model_len=10)
    assert batches == [
        "A3 B3",  # two blocks each, one left
        "A B",  # the second token each; both blocks are full now
        "A",  # A takes the last block; B, the latest, gives up its own
        "A",  # B needs 3 blocks for its 5 tokens; 2 are free
        "B5",  # prompt and two output tokens in one go: its third token
    ]
    assert scheduler.recomputed_tokens == 4


def test_sarathi_recomputes_in_chunks() -> None:
    batches, scheduler = play(
        "sarathi", {"A": (3, 4), "B": (3, 3)}, block_size=2, blocks=5, max_model_len=10, max_num_batched_tokens=4,
        max_num_seqs=2,
    )  # fmt: skip
    assert batches == ["A3 B1", "A B2", "A B", "A", "B4", "B"]
    assert scheduler.recomputed_tokens == 4


@pytest.mark.parametrize("policy", ["vllm_v0", "sarathi"])
def test_the_latest_request_is_preempted_for_an_earlier_one(policy: str) -> None:
    batches, scheduler = play(policy, {"A": (4, 3), "B": (3, 2)}, block_size=2, blocks=4, max_model_len=8,
                              max_num_batched_tokens=10)  # fmt: skip
    assert batches == ["A4 B3", "A", "A", "B4"]  # B had room for its next token, A had not
    assert scheduler.recomputed_tokens == 3


def test_a_preempted_request_goes_before_those_that_never_ran() -> None:
    batches, _ = play(
        "vllm_v0", {"A": (4, 3), "B": (3, 2), "C": (2, 1)}, arrive={"C": 2}, block_size=2, blocks=4, max_model_len=8
    )
    # after A's second token one block is free: C would fit, but B, with two blocks to get, is before it
    assert batches == ["A4 B3", "A", "A", "B4 C2"]


def test_half_a_prompt_can_be_preempted() -> None:
    batches, scheduler = play(
        "sarathi", {"A": (2, 6), "B": (6, 1)}, block_size=2, blocks=4, max_model_len=8, max_num_batched_tokens=3,
        max_num_seqs=2,
    )  # fmt: skip
    assert batches == [
        "A2 B1",  # A holds 1 block, B 3 for its whole prompt: none is free
        "A",  # A needs a second block: B and the token of it are thrown out
        "A",  # 3 tokens in 2 blocks
        "A",  # 4 tokens; then a third block
        "A",
        "A",
        "B3",
        "B3",
    ]
    assert scheduler.recomputed_tokens == 1


# -- the dynamic chunk schedule ----------------------------------------------------------------------------------------

DYNAMIC = {
    "max_num_batched_tokens": 100,
    "max_num_seqs": 2,
    "chunk_schedule": "dynamic",
    "chunk_schedule_high": 8,
    "chunk_schedule_low": 2,
    "chunk_schedule_stages": 4,
    "chunk_schedule_max_tokens": 16,
}  # 8, 6, 4 and 2 tokens, for the first 4 tokens of a prompt, the second 4, ...


def test_dynamic_chunks_shrink_as_the_prefix_grows() -> None:
    assert chunk_sizes(SchedulerSpec(**DYNAMIC)) == [8, 6, 4, 2]  # type: ignore[arg-type]
    batches, _ = play("sarathi", {"A": (24, 1)}, **DYNAMIC)
    assert batches == ["A8", "A4", "A2", "A2", "A2", "A2", "A2", "A2"]


@pytest.mark.parametrize(
    ("low", "high", "stages"),
    [(128, 512, 16), (256, 2048, 10), (32, 96, 3), (64, 1024, 7), (20, 100, 5)],
)
def test_dynamic_chunks_are_those_of_the_original(low: int, high: int, stages: int) -> None:
    """Multiples of 32 tokens, or of the smallest chunk if that is less: NumPy's steps, truncated, then rounded."""
    spec = SchedulerSpec(chunk_schedule_low=low, chunk_schedule_high=high, chunk_schedule_stages=stages)
    unit = min(32, low)
    steps = np.linspace(low, high, stages, dtype=np.int32)[::-1]
    assert chunk_sizes(spec) == (np.round(steps / unit) * unit).astype(int).tolist()


def test_dynamic_chunks_stay_between_ends_that_are_no_multiples() -> None:
    spec = SchedulerSpec(chunk_schedule_low=40, chunk_schedule_high=110, chunk_schedule_stages=4)
    assert chunk_sizes(spec) == [96, 96, 64, 40]
    assert chunk_sizes(replace(spec, chunk_schedule_high=122)) == [122, 96, 64, 40]


def test_dynamic_chunks_share_their_size_with_the_decodes() -> None:
    batches, _ = play("sarathi", {"B": (3, 3), "A": (20, 1)}, **DYNAMIC)
    assert batches == ["B3 A5", "B A5", "B A3", "A2", "A2", "A2", "A"]


def test_dynamic_chunks_larger_than_the_token_budget_are_refused() -> None:
    with pytest.raises(InputError, match=r"from 8 down to 2 tokens: .* at most --max-num-batched-tokens 5"):
        resolve(SchedulerSpec(**{**DYNAMIC, "max_num_batched_tokens": 5}), 30)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"chunk_schedule_low": 3}, "chunk_schedule_low 3 needs chunk_schedule 'dynamic'"),
        ({"chunk_schedule": "dynamic", "policy": "vllm_v0"}, "vllm_v0 does not"),
    ],
)
def test_a_chunk_schedule_that_would_be_ignored_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        resolve(SchedulerSpec(**settings), 4096)


def test_dynamic_chunks_smaller_than_max_num_seqs_are_refused() -> None:
    with pytest.raises(InputError, match=r"down to 2 tokens: chunk_schedule_low must be at least --max-num-seqs 3"):
        resolve(SchedulerSpec(**{**DYNAMIC, "max_num_seqs": 3}), 30)  # type: ignore[arg-type]


# -- limits that contradict each other ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["sarathi", "vllm", "vllm_v0", "chunked_only"])
def test_a_budget_below_max_num_seqs_is_refused(policy: str) -> None:
    with pytest.raises(InputError, match="--max-num-batched-tokens 7 is less than --max-num-seqs 8"):
        resolve(SchedulerSpec(policy=policy, max_num_batched_tokens=7, max_num_seqs=8), 30)
    resolve(SchedulerSpec(policy=policy, max_num_batched_tokens=8, max_num_seqs=8), 30)


def test_an_unknown_policy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="unknown scheduler 'sarathy': did you mean 'sarathi'"):
        resolve(SchedulerSpec(policy="sarathy"), 30)


@pytest.mark.parametrize(
    ("policy", "budget"),
    [("sarathi", 512), ("chunked_only", 512), ("vllm", 2048), ("vllm_v0", 4096), ("orca", None), ("hybrid_only", 4096)],
)
def test_lengths_left_open_come_from_the_model_and_the_policy(policy: str, budget: int) -> None:
    spec = resolve(SchedulerSpec(policy=policy), 4096)
    assert (spec.max_model_len, spec.max_num_batched_tokens) == (4096, budget)
    assert resolve(SchedulerSpec(policy=policy, max_model_len=100), 4096).max_model_len == 100
    assert resolve(SchedulerSpec(policy="vllm_v0"), 1000).max_num_batched_tokens == 2048


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_policy_has_its_watermark_unless_one_is_given(policy: str) -> None:
    default = 0.0 if policy in ("orca", "request_level", "vllm") else 0.01  # the originals of these have none
    spec = resolve(SchedulerSpec(policy=policy), 30)
    assert spec.watermark == default
    assert Scheduler(spec, 1000).kv_cache.watermark_blocks == 1000 * default
    given = resolve(SchedulerSpec(policy=policy, watermark=0.2), 30)
    assert given.watermark == 0.2
    assert Scheduler(given, 1000).kv_cache.watermark_blocks == 200


def test_every_policy_has_a_hand_worked_schedule_here() -> None:
    assert set(POLICIES) == {"sarathi", "vllm", "vllm_v0", "orca", "request_level", "chunked_only", "hybrid_only"}
