"""Our own engine behind the server, on a CPU: what it says is what transformers generates."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import checkpoints
import httpx
import numpy as np
import pytest
import torch
from http_serving import Running, Steady, deployment, running
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cli.main import run
from engine.executors.start import start
from engine.replica_spec import resolve
from engine.results.recorder import Recorder
from engine.runtime.driver import Driver, VirtualClock
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import Result, Step, WorkerError
from engine.runtime.sequences import Sequence
from engine.scheduling.request import Request
from engine.server.live import LiveEngine
from engine.server.requests import Limits
from engine.server.text import load_tokenizer
from engine.specs import ParallelSpec
from simulator.predicted_executor import PredictedExecutor

if TYPE_CHECKING:
    import openai  # takes a second: only the worker that runs these tests does

TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}a"
PROMPT = [5, 17, 9, 3, 24]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer whose tokens are letters, and a chat template."""
    folder = tmp_path_factory.mktemp("speaking")
    checkpoints.write(folder, "llama")
    words = ["<unk>", "<s>", "</s>", *"Ġabcdefghijklmnopqrstuvwxyz"]
    words += [f"W{i}" for i in range(len(words), checkpoints.VOCABULARY)]
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(words[:3])
    made.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Running]:
    replica = resolve(str(folder), "cpu", scheduler={"max_model_len": 128, "max_num_seqs": 8, "block_size": 4},
                      num_gpu_blocks_override=200)  # fmt: skip
    executor = start(EngineSpec.of(replica, folder=folder, attention_backend="sdpa"))
    recorder = Recorder(predicted=False)
    engine = LiveEngine(Driver(replica.new_scheduler(), executor, recorder))
    codec = load_tokenizer(folder)
    assert codec is not None
    codec.vocab_size = checkpoints.VOCABULARY
    limits = Limits(models=("llama",), max_model_len=128, simulated=False)
    with running(engine, codec=codec, limits=limits, recorder=recorder) as found:
        yield found
    engine.close()
    executor.close()


@pytest.fixture(scope="module")
def client(served: Running) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def truth(folder: Path) -> tuple[list[int], torch.Tensor]:
    """24 greedy tokens after PROMPT by transformers, and the log probabilities that each was taken from."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, rows = list(PROMPT), []
    with torch.inference_mode():
        for _ in range(24):
            rows.append(model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1))
            tokens.append(int(rows[-1].argmax()))
    return tokens[len(PROMPT) :], torch.stack(rows)


def text_of(served: Running, tokens: list[int]) -> str:
    text: str = served.server.codec.tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[attr-defined]
    return text


def test_it_says_what_transformers_generates(served: Running, client: openai.OpenAI, truth) -> None:  # type: ignore[no-untyped-def]
    tokens, _ = truth
    asked = {"model": "llama", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    answer = client.completions.create(**asked, extra_body={"ignore_eos": True})
    assert answer.choices[0].text == text_of(served, tokens)
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    stream = client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_log_probabilities_are_the_models(client: openai.OpenAI, truth) -> None:  # type: ignore[no-untyped-def]
    tokens, rows = truth
    asked = {"model": "llama", "prompt": PROMPT, "temperature": 0, "max_tokens": 6, "logprobs": 3}
    found = client.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0].logprobs
    assert found is not None
    expected = [float(rows[i, token]) for i, token in enumerate(tokens[:6])]
    assert found.token_logprobs == pytest.approx(expected, abs=1e-4)
    for i, top in enumerate(found.top_logprobs or ()):
        assert sorted(top.values()) == pytest.approx(sorted(rows[i].topk(3).values.tolist()), abs=1e-4)
    streamed = client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
    parts = [chunk.choices[0].logprobs.token_logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [value for part in parts for value in part] == pytest.approx(expected, abs=1e-4)
    chat = client.chat.completions.create(
        model="llama", messages=[{"role": "user", "content": "hello"}], max_tokens=3, logprobs=True, top_logprobs=2,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    assert [len(each.top_logprobs) for each in chat.choices[0].logprobs.content] == [2, 2, 2]


def test_stop_texts_and_stop_tokens_end_it(served: Running, client: openai.OpenAI, truth) -> None:  # type: ignore[no-untyped-def]
    tokens, _ = truth
    asked = {"model": "llama", "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    place = next(i for i in range(4, 24) if tokens[i] not in tokens[:i])
    ended = client.completions.create(**asked, extra_body={"ignore_eos": True, "stop_token_ids": [tokens[place]]})
    assert ended.choices[0].finish_reason == "stop"
    assert ended.choices[0].text == text_of(served, tokens[:place])
    whole = text_of(served, tokens)
    stop = whole[6:9]
    cut = client.completions.create(**asked, stop=[stop, "@@"], extra_body={"ignore_eos": True})
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (whole[: whole.find(stop)], "stop")
    stream = client.completions.create(**asked, stop=stop, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].text for chunk in stream) == cut.choices[0].text
    assert cut.usage is not None
    needed = next(i for i in range(1, 25) if stop in text_of(served, tokens[:i]))  # what comes later counts nowhere
    assert cut.usage.completion_tokens == needed
    late = client.completions.create(
        **asked, extra_body={"ignore_eos": True, "stop_token_ids": [tokens[place]], "min_tokens": place + 2}
    )
    assert late.usage is not None and late.usage.completion_tokens > place + 1


def test_seeds_repeat_and_a_chat_goes_through_the_template(served: Running, client: openai.OpenAI) -> None:
    asked = {"model": "llama", "messages": [{"role": "user", "content": "hello you"}], "max_tokens": 12}
    texts = [
        client.chat.completions.create(**asked, seed=seed, extra_body={"top_k": 50}).choices[0].message.content
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": " you"}]
    answer = client.chat.completions.create(
        model="llama", messages=[{"role": "user", "content": parts}], max_tokens=1  # type: ignore[list-item]
    )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(served.server.codec.encode("u hello you a"))
    half = '{"prompt": "a \\ud800", "messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}'
    for path in ("completions", "chat/completions"):  # half of a surrogate pair is text that is no text
        assert httpx.post(f"{served.url}/v1/{path}", content=half, timeout=60).status_code == 200


def test_a_client_that_leaves_frees_its_blocks(served: Running) -> None:
    driver = served.server.backend.driver  # type: ignore[attr-defined]
    body = {"prompt": PROMPT, "max_tokens": 120, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
        assert driver.unfinished == 1
    for _ in range(2000):
        if not driver.unfinished:
            break
        time.sleep(0.01)
    assert (driver.unfinished, driver.scheduler.kv_cache.num_used) == (0, 0)
    answer = httpx.post(f"{served.url}/v1/completions", json={**body, "max_tokens": 2, "stream": False}, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_on_a_pipeline_requests_join_while_a_batch_is_in_flight() -> None:
    replica = deployment().replica
    spec = replace(replica, parallel=ParallelSpec(pipeline_parallel_size=2), async_scheduling=False)
    driver = Driver(spec.new_scheduler(), PredictedExecutor(Steady(0.15), 400, num_stages=2), Recorder())
    engine = LiveEngine(driver)
    limits = Limits(models=("phi",), max_model_len=512, simulated=False)

    async def ask(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            body = {"prompt": [1, 2, 3], "max_tokens": 4}
            first = asyncio.create_task(client.post("/v1/completions", json=body))
            while driver.in_flight < 1:
                await asyncio.sleep(0.002)
            second = asyncio.create_task(client.post("/v1/completions", json=body))
            assert [(await each).status_code for each in (first, second)] == [200, 200]

    with running(engine, limits=limits) as served:
        asyncio.run(ask(served.url))
    engine.close()
    driver.recorder.close()
    rows = driver.recorder.iterations_kept()
    first_stage = rows["start_s"][rows["stage"] == 0]
    assert (np.diff(first_stage) < 0.29).any()  # the second was launched before the first had left both stages


def test_what_the_engine_cannot_do_is_refused(served: Running) -> None:
    for field, value in {"echo": True, "best_of": 2, "presence_penalty": 0.5, "tools": [{}]}.items():
        answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": PROMPT, field: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": [checkpoints.VOCABULARY]})
    assert "is not below 101" in answer.json()["error"]["message"]


def test_a_worker_that_dies_is_an_error_and_no_hang() -> None:
    class Dying:
        num_blocks, attention_backend, hardware = 50, "none", "none"

        def launch(self, step: Step) -> None:
            raise WorkerError("rank 0 was killed")

        def wait(self, timeout: float | None) -> Result | None:
            raise AssertionError("nothing was launched")

        def close(self) -> None:
            pass

    replica = resolve("microsoft/phi-2", "cpu", scheduler={"max_model_len": 64}, num_gpu_blocks_override=50)
    failed = []
    engine = LiveEngine(Driver(replica.new_scheduler(), Dying(), Recorder()), on_failure=lambda: failed.append(True))
    with running(engine, limits=Limits(models=("phi",), max_model_len=64, simulated=False)) as served:
        for _ in range(2):
            answer = httpx.post(f"{served.url}/v1/completions", json={"prompt": [1, 2], "max_tokens": 2}, timeout=30)
            assert (answer.status_code, "rank 0 was killed" in answer.text) == (500, True)
        assert httpx.get(f"{served.url}/health").status_code == 503
    assert failed == [True]
    engine.close()


def test_a_stopped_sequence_counts_as_finished_and_an_aborted_one_does_not() -> None:
    clock, recorder = VirtualClock(), Recorder()
    driver = Driver(deployment().new_scheduler(), PredictedExecutor(Steady(), 400, clock=clock), recorder, clock=clock)
    driver.start()
    for id in (0, 1):
        driver.submit(Sequence(Request(id, 0.0, 5, 50), [1] * 5))
        driver.submit(Sequence(Request(id + 2, 0.0, 5, 50), [1] * 5))
    for _ in range(3):
        driver.step()
    driver.stop(0)
    driver.abort(1)
    driver.stop(7)  # nobody's
    driver.stop(2, 1)  # two tokens came after the text was complete
    driver.abort(3)
    recorder.close()
    found = recorder.requests()
    assert (found["request_id"].tolist(), found["output_tokens"].tolist()) == ([0, 2], [3, 1])
    assert found["last_token_s"][1] == found["first_token_s"][1] < found["last_token_s"][0]
    assert driver.unfinished == 0 and driver.scheduler.kv_cache.num_used == 0


def test_a_validation_asks_it_what_it_is_and_counts_by_its_tokenizer(
    served: Running, folder: Path, tmp_path: Path
) -> None:
    """From profile to validation by URL: here with a predictor that was not measured, so that errors are found."""
    load = ["--workload", "fixed", "--input-len", "9", "--output-len", "6", "--request-rate", "40"]
    load += ["--num-prompts", "8"]
    asked = ["--model", str(folder), "--device", "cpu", "--tokenizer", str(folder), "--ignore-eos", *load]
    assert run(["validate", "--against", served.url, *asked, "--output-dir", str(tmp_path / "check")]) == (0, "")
    found = json.loads((tmp_path / "check" / "validation.json").read_text())
    said = {name: found["said"][name] for name in ("model", "max_model_len", "block_size", "num_gpu_blocks")}
    assert said == {"model": "llama", "max_model_len": 128, "block_size": 4, "num_gpu_blocks": 200}
    assert found["num_gpu_blocks"] == 200 and found["failed"] == 0
    (compared,) = found["loads"]
    assert compared["requests"] == 8 and compared["latencies"]["tpot"]["p50"]["error"] < -0.5  # a roofline's, on a CPU
    summary = json.loads((tmp_path / "check" / "server" / "summary.json").read_text())
    assert (summary["total_input_tokens"], summary["total_output_tokens"]) == (72, 48)
    assert not any("approximate" in note for note in summary["workload_notes"])
