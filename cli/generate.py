"""`windtunnel generate`: generate from prompts on this machine's engine."""

from __future__ import annotations

import json
import sys
from typing import Any

from cli.engine import engine_device, engine_spec
from engine.errors import InputError
from engine.executors.start import start
from engine.results.recorder import Recorder
from engine.runtime.driver import Driver
from engine.runtime.engine_spec import EngineSpec
from engine.runtime.executor import SamplingParams
from engine.runtime.sequences import Sequence
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.server.text import end_tokens, load_tokenizer
from windtunnel.settings import GenerateConfig


def run(
    config: GenerateConfig, prompts: list[str], prompt_token_ids: list[str], *, ignore_eos: bool, as_json: bool
) -> list[dict[str, Any]]:
    """Generate, print, and return for each prompt its token ids, the new ones, and their text."""
    if not prompts and not prompt_token_ids:
        raise InputError("no prompt given: add --prompt TEXT or --prompt-token-ids 1,2,3")
    if not config.model:
        raise InputError("no model given: add --model FOLDER")
    if config.max_tokens < 1:
        raise InputError(f"max_tokens {config.max_tokens}: give at least 1")
    sampling = SamplingParams(config.temperature, config.top_k, config.top_p)
    replica = config.replica_spec(engine_device(config.device))
    spec = engine_spec(replica, config.model, config, config.seed)
    ids = [_parse(text) for text in prompt_token_ids]
    stop = frozenset() if ignore_eos else end_tokens(spec.folder)
    codec = load_tokenizer(spec.folder)
    tokenizer: Any = codec.tokenizer if codec is not None else None
    if prompts and tokenizer is None:
        raise InputError(f"{config.model} has no tokenizer for --prompt: give --prompt-token-ids 1,2,3")
    ids = [*(tokenizer.encode(text) for text in prompts), *ids]
    sequences = [
        Sequence(Request(i, 0.0, len(prompt), _output_tokens(config, spec, i, prompt)), prompt, sampling, stop)
        for i, prompt in enumerate(ids, start=1)
    ]
    if spec.num_blocks is not None:  # else the executor knows how many there are, and is asked first
        _check(replica.new_scheduler(spec.num_blocks), sequences)
    executor = start(spec, config.executor)
    try:
        scheduler = replica.new_scheduler(executor.num_blocks)
        _check(scheduler, sequences)
        shown = _Stream(tokenizer) if len(sequences) == 1 and tokenizer is not None and not as_json else None
        driver = Driver(
            scheduler,
            executor,
            Recorder(predicted=False),
            seed=config.seed,
            on_token=shown,
        )
        driver.run(sequences)
    finally:
        executor.close()
    answers = [_answer(sequence, tokenizer) for sequence in sequences]
    if as_json:
        print(json.dumps(answers))
    elif shown is not None:
        shown.end(answers[0]["text"])
    else:
        for answer in answers:
            print(answer.get("text", ",".join(map(str, answer["token_ids"]))))
    return answers


def _output_tokens(config: GenerateConfig, spec: EngineSpec, number: int, prompt: list[int]) -> int:
    """Return the maximum number of tokens to generate. Raises InputError for an impossible prompt."""
    wrong = next((token for token in prompt if not 0 <= token < spec.model.vocab_size), None)
    if wrong is not None:
        raise InputError(f"token id {wrong} is not among the model's: give 0 to {spec.model.vocab_size - 1}")
    if not prompt:
        raise InputError(f"prompt {number} has no tokens: give at least one")
    room = spec.max_model_len - len(prompt)
    if room < 1:
        raise InputError(
            f"prompt {number} has {len(prompt)} tokens, which leaves no room in --max-model-len {spec.max_model_len}: "
            "shorten it or raise --max-model-len"
        )
    return min(config.max_tokens, room)


def _check(scheduler: Scheduler, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        scheduler.check(sequence.request)


def _answer(sequence: Sequence, tokenizer: Any) -> dict[str, Any]:
    answer = {
        "prompt_token_ids": sequence.tokens[: sequence.request.prompt_tokens],
        "token_ids": sequence.output,
        "finish_reason": sequence.finish_reason,
    }
    return answer if tokenizer is None else {**answer, "text": _text(tokenizer, sequence)}


def _text(tokenizer: Any, sequence: Sequence) -> str:
    text: str = tokenizer.decode(sequence.output, skip_special_tokens=True)
    return text


class _Stream:
    """Print a sequence's text as it grows; a character of several tokens is held back until it is whole."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._shown = 0

    def __call__(self, sequence: Sequence, token: int) -> None:
        text = _text(self._tokenizer, sequence)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            sys.stdout.write(text[self._shown :])
            sys.stdout.flush()
            self._shown = len(text)

    def end(self, text: str) -> None:
        """Print the rest of the whole text and end the line."""
        print(text[self._shown :])


def _parse(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",")]
    except ValueError:
        raise InputError(f"--prompt-token-ids {text!r}: give whole numbers such as 1,2,3") from None
