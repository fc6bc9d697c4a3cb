"""A simulated server as its clients see it: the openai package, httpx and a load generator."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from http_serving import MODEL, Running, deployment, simulated

from engine.loadgen.client import Endpoint, parse_metrics
from engine.results.recorder import Recorder
from engine.scheduling.request import BatchShape
from engine.server.requests import MOST_CHOICES
from engine.server.text import BytesRule
from engine.workload.workload import Workload
from simulator.cluster import simulate
from simulator.live import LiveCluster

if TYPE_CHECKING:
    import openai  # takes a second: only the worker that runs these tests does


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with simulated([deployment()] * 2) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def sample(url: str, name: str) -> float:
    page = httpx.get(f"{url}/metrics").text
    return sum(value for found, _, value in parse_metrics(page) if found == name)


def test_a_completion_has_the_tokens_that_were_asked_for(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="hello world!", max_tokens=5)
    assert answer.choices[0].text == " the" * 5
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)


def test_prompts_of_token_ids_count_exactly(client: openai.OpenAI) -> None:
    for prompt, tokens in (([5] * 17, 17), ([[1, 2], [3, 4, 5]], 5), (["abcd", "abcdefgh"], 3)):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2)  # type: ignore[arg-type]
        assert answer.usage is not None and answer.usage.prompt_tokens == tokens
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_a_chat_streams_with_usage_at_the_end(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        max_completion_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == " the" * 4
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
    prompt = BytesRule().chat([{"role": "user", "content": "hi"}])
    assert chunks[-1].usage.prompt_tokens == len(prompt)


def test_n_sequences_stream_side_by_side(client: openai.OpenAI) -> None:
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.completions.create(model=MODEL, prompt="a", n=3, max_tokens=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert set(texts.values()) == {" the" * 3}


def test_an_open_length_is_drawn_and_ends_by_itself(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert (answer.choices[0].finish_reason, answer.usage and answer.usage.completion_tokens) == ("stop", 7)
    assert answer.choices[0].message.content == " the" * 7


def test_it_names_its_model_and_itself(served: Running, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.model_dump()["max_model_len"]) == (MODEL, 512)
    assert client.models.retrieve(MODEL).id == MODEL
    assert httpx.get(f"{served.url}/health").status_code == 200
    about = httpx.get(f"{served.url}/version").json()
    assert about["simulated"] is True and "4 bytes" in about["prompts"]


def test_what_a_client_does_wrong_is_said_in_openais_words(served: Running, client: openai.OpenAI) -> None:
    import openai

    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as error:
        client.completions.create(model=MODEL, prompt=[1] * 500, max_tokens=13)
    assert error.value.code == "context_length_exceeded"
    assert client.completions.create(model=MODEL, prompt=[1] * 500, max_tokens=12).usage


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"{", "not JSON"),
        (b"[1]", "JSON object"),
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "no tokens"),
        ({"prompt": [1, -1]}, "token id -1"),
        ({"prompt": "a", "max_tokens": "9"}, "max_tokens '9'"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens 0"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens True"),
        ({"prompt": "a", "temperature": 3}, "temperature 3"),
        ({"prompt": "a", "top_p": 0}, "top_p 0"),
        ({"prompt": "a", "top_k": -2}, "top_k -2"),
        ({"prompt": "a", "n": MOST_CHOICES + 1}, "n 129"),
        ({"prompt": ["a"] * 100, "n": 2}, "100 prompts"),
        ({"prompt": "a", "stream": "yes"}, "stream 'yes'"),
        ({"prompt": "a", "stop": [1]}, "stop"),
        ({"prompt": "a", "min_tokens": 9, "max_tokens": 3}, "min_tokens 9"),
        ({"prompt": "a", "logprobs": 2}, "no logprobs"),
        ({"prompt": "a", "stream_options": 1}, "stream_options"),
    ],
    ids=str,
)
def test_bad_bodies_are_refused(served: Running, body: bytes | dict[str, object], word: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(f"{served.url}/v1/completions", content=content)
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]


def test_bad_chats_paths_and_sizes_are_refused(served: Running) -> None:
    for messages in (None, [], ["hi"], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]):
        answer = httpx.post(f"{served.url}/v1/chat/completions", json={"messages": messages})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert httpx.get(f"{served.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{served.url}/v1/completions").status_code == 405
    too_long = httpx.post(f"{served.url}/v1/completions", content=b" " * ((32 << 20) + 1))
    assert too_long.status_code == 413 and "32 MiB" in too_long.json()["error"]["message"]
    with pytest.raises(httpx.HTTPError):  # or a 400, if it is read before the connection is closed
        httpx.get(f"{served.url}/health", headers={"x": "y" * (1 << 20)}).raise_for_status()


def test_a_key_is_asked_for() -> None:
    with simulated([deployment()], api_key="secret") as served:
        asked = httpx.get(f"{served.url}/v1/models")
        assert (asked.status_code, asked.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{served.url}/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_client_that_leaves_frees_its_blocks_and_a_full_queue_turns_others_away() -> None:
    slow = deployment(0.05, max_num_seqs=1)
    with simulated([slow], max_queue=1) as served:
        replica = served.server.backend.replicas[0]  # type: ignore[attr-defined]
        body = {"prompt": [1] * 40, "max_tokens": 400, "stream": True}

        async def leave() -> httpx.Response:
            async with httpx.AsyncClient(base_url=served.url, timeout=30) as client:
                async with client.stream("POST", "/v1/completions", json=body) as first:
                    async for _ in first.aiter_lines():
                        break
                    waiting = asyncio.create_task(client.post("/v1/completions", json={**body, "stream": False}))
                    while not replica.driver.scheduler.waiting:
                        await asyncio.sleep(0.005)
                    refused = await client.post("/v1/completions", json=body)
                    waiting.cancel()
                return refused

        refused = asyncio.run(leave())
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "overloaded"
        for _ in range(1000):
            if not replica.driver.unfinished:
                break
            asyncio.run(asyncio.sleep(0.01))
        assert replica.driver.unfinished == 0
        scheduler = replica.driver.scheduler
        assert scheduler.kv_cache.num_used == 0 and not scheduler.waiting
        assert served.server.num_aborted == 2
        page = httpx.get(f"{served.url}/metrics").text
        assert re.search(r'vllm:request_success_total\{[^}]*finished_reason="abort"[^}]*\} 2.0', page)


def test_metrics_have_vllms_names_and_count(served: Running, client: openai.OpenAI) -> None:
    before = {name: sample(served.url, f"vllm:{name}") for name in (
        "generation_tokens_total", "prompt_tokens_total", "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count", "request_success_total",
    )}  # fmt: skip
    client.completions.create(model=MODEL, prompt=[3] * 20, max_tokens=6)
    after = {name: sample(served.url, f"vllm:{name}") - value for name, value in before.items()}
    assert list(after.values()) == [6, 20, 1, 5, 1, 1]
    names = {name for name, _, _ in parse_metrics(httpx.get(f"{served.url}/metrics").text)}
    assert {f"vllm:{name}" for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
        "prefix_cache_hits_total", "num_preemptions_total", "request_queue_time_seconds_bucket",
        "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum", "cache_config_info",
        "request_time_per_output_token_seconds_count", "request_generation_tokens_sum",
    )} <= names  # fmt: skip
    asked = asyncio.run(_facts(served.url))
    assert (asked.num_gpu_blocks, asked.block_size, asked.num_replicas, asked.max_model_len) == (400, 16, 2, 512)


async def _facts(url: str):  # type: ignore[no-untyped-def]
    async with Endpoint(url) as endpoint:
        return await endpoint.facts()


def test_the_run_is_what_is_simulated_for_the_same_arrivals() -> None:
    kinds = [deployment(0.004), deployment(0.003)]
    lengths = [(30, 9), (200, 3), (7, 20), (90, 1), (14, 12), (55, 5), (8, 8), (300, 6)] * 4

    async def load(url: str) -> None:
        async def one(place: int, prompt: int, output: int) -> None:
            await asyncio.sleep(0.007 * place)
            body = {"prompt": [place + 1] * prompt, "max_tokens": output, "stream": True}
            assert (await client.post("/v1/completions", json=body)).status_code == 200

        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            await asyncio.gather(*(one(place, *each) for place, each in enumerate(lengths)))

    with simulated(kinds) as served:
        asyncio.run(load(served.url))
    assert served.recorder is not None
    measured = served.recorder.requests()
    order = np.argsort(measured["arrived_s"])
    columns = [measured[name][order] for name in ("arrived_s", "prompt_tokens", "output_tokens")]
    again = simulate(Workload("again", *columns, 0), kinds)
    mine = np.argsort(again.requests["request_id"])
    assert sorted(zip(columns[1].tolist(), columns[2].tolist(), strict=True)) == sorted(lengths)
    for name in ("replica", "scheduled_s", "first_token_s", "last_token_s", "max_tbt_s"):
        np.testing.assert_allclose(again.requests[name][mine], measured[name][order], rtol=1e-12, err_msg=name)


def test_simulated_time_may_pass_faster() -> None:
    with simulated([deployment(1.0)], time_scale=500) as served:
        assert httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": 30}).status_code == 200
    assert served.recorder is not None
    found = served.recorder.requests()
    assert found["last_token_s"][0] - found["arrived_s"][0] == pytest.approx(30.0)


def test_a_predictor_that_fails_ends_every_request_with_an_error() -> None:
    kind = deployment()

    class Broken(type(kind.predictor)):  # type: ignore[misc]
        def stage_time(self, shape: BatchShape, stage: int) -> float:
            if shape.num_decodes:
                raise ArithmeticError("no such time")
            return 0.002

    stopped = []
    cluster = LiveCluster([type(kind)(kind.replica, Broken())], Recorder())
    cluster.on_failure = lambda: stopped.append(True)
    from http_serving import running

    with running(cluster) as served:
        answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": 3})
        assert answer.status_code == 500 and "no such time" in answer.json()["error"]["message"]
        assert httpx.get(f"{served.url}/health").status_code == 503
        again = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": 3})
        assert again.status_code == 500
    assert stopped == [True]
    cluster.close()
