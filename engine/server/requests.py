"""What OpenAI's completion and chat requests ask for, read field by field; errors in OpenAI's words.

asked = read_completion(body, codec, limits)   # or read_chat; raises ApiError, which has status and body
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError
from engine.runtime.executor import MOST_LOGPROBS, SamplingParams
from engine.server.text import TextCodec

MOST_CHOICES = 128  # sequences of one HTTP request
MOST_STOPS = 16
DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, as OpenAI and vLLM have it
_NOT_DONE = {  # what changes the text and the engine can't do, and what does no harm
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "guided_json": (None,),
    "prompt_logprobs": (None,),
    "use_beam_search": (None, False),
}


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] = {}
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code or status}}


@dataclass(frozen=True)
class Limits:
    """What a server can do."""

    models: tuple[str, ...]
    max_model_len: int
    simulated: bool
    # simulated: how many tokens the model makes, given max_tokens (None: left open) and whether to ignore its end
    draw_length: Callable[[int | None, bool], int] | None = None


@dataclass(frozen=True)
class Asked:
    """A request: each prompt is continued `n` times."""

    prompts: list[list[int]]
    n: int
    output_tokens: list[int]  # the most, of each prompt
    stops_early: list[bool]  # simulated: whether that length is where the model stops by itself
    sampling: SamplingParams
    stop: tuple[str, ...]
    stop_tokens: frozenset[int]
    min_tokens: int
    stream: bool
    include_usage: bool
    usage_in_each_chunk: bool
    chat: bool
    model: str


def read_completion(body: Mapping[str, Any], codec: TextCodec, limits: Limits) -> Asked:
    """Read the body of /v1/completions."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        prompts = [codec.encode(prompt)]
    elif isinstance(prompt, list) and prompt and all(_whole(each) for each in prompt):
        prompts = [prompt]
    elif isinstance(prompt, list) and prompt and all(isinstance(each, str) for each in prompt):
        prompts = [codec.encode(each) for each in prompt]
    elif isinstance(prompt, list) and prompt and all(
        isinstance(each, list) and all(_whole(token) for token in each) for each in prompt
    ):  # fmt: skip
        prompts = prompt
    else:
        raise ApiError(400, "prompt: give a text, token ids, or a list of either", "prompt")
    logprobs = _number(body, "logprobs", None, 0, MOST_LOGPROBS, whole=True)
    return _read(body, prompts, codec, limits, logprobs, body.get("max_tokens"), DEFAULT_COMPLETION_TOKENS, chat=False)


def read_chat(body: Mapping[str, Any], codec: TextCodec, limits: Limits) -> Asked:
    """Read the body of /v1/chat/completions."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages: give a list of at least one message", "messages")
    plain = [_message(message, place) for place, message in enumerate(messages)]
    try:
        prompt = codec.chat(plain)
    except InputError as error:
        raise ApiError(400, str(error), "messages") from None
    logprobs = None
    if _flag(body, "logprobs", False):
        logprobs = _number(body, "top_logprobs", 0, 0, MOST_LOGPROBS, whole=True)
    elif body.get("top_logprobs"):
        raise ApiError(400, "top_logprobs needs logprobs true", "top_logprobs")
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    return _read(body, [prompt], codec, limits, logprobs, most, None, chat=True)


def _message(message: Any, place: int) -> dict[str, Any]:
    """Return a message with its content as text."""
    where = f"messages[{place}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f"{where}: give an object with a role and a content", "messages")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiError(400, f"{where}: only parts of type text are served", "messages")
        content = "".join(part["text"] for part in content)
    elif content is None and message["role"] == "assistant":
        content = ""
    if not isinstance(content, str):
        raise ApiError(400, f"{where}.content: give a text", "messages")
    return {**message, "content": content}


def _read(
    body: Mapping[str, Any],
    prompts: list[list[int]],
    codec: TextCodec,
    limits: Limits,
    logprobs: Any,
    most: Any,
    most_by_default: int | None,
    *,
    chat: bool,
) -> Asked:
    """Read what both kinds of request have."""
    model = body.get("model")
    if model is not None and model not in limits.models:
        raise ApiError(
            404, f"The model `{model}` does not exist: this server has {', '.join(limits.models)}", "model",
            "model_not_found",
        )  # fmt: skip
    if not limits.simulated:
        for name, harmless in _NOT_DONE.items():
            if name in body and body[name] not in harmless:
                raise ApiError(400, f"{name} is not supported: leave it out", name)
    elif logprobs is not None:
        raise ApiError(400, "a simulated model has no logprobs: leave them out", "logprobs")
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise ApiError(400, f"prompt {place} has no tokens: give at least one", "prompt")
        low, high = min(prompt), max(prompt)
        highest = codec.vocab_size or 1 << 31
        if low < 0 or high >= highest:
            raise ApiError(400, f"token id {low if low < 0 else high} is not below {highest}", "prompt")
    n = _number(body, "n", 1, 1, MOST_CHOICES, whole=True)
    if n * len(prompts) > MOST_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts, {n} times each: at most {MOST_CHOICES} in one request", "n")
    name = "messages" if chat else "prompt"
    given = None if most is None else _check_number("max_tokens", most, 1, math.inf, whole=True)
    ignore_eos = _flag(body, "ignore_eos", False)
    min_tokens = _number(body, "min_tokens", 0, 0, math.inf, whole=True)
    if given is not None and min_tokens > given:
        raise ApiError(400, f"min_tokens {min_tokens} is over max_tokens {given}", "min_tokens")
    lengths, early = [], []
    for prompt in prompts:
        room = limits.max_model_len - len(prompt)
        if room < max(1, given or min_tokens):
            raise ApiError(
                400,
                f"This model's maximum context length is {limits.max_model_len} tokens. However, you requested "
                f"{given or max(1, min_tokens)} output tokens and your prompt contains {len(prompt)} input tokens: "
                "shorten one of them",
                name,
                "context_length_exceeded",
            )
        open_length = most_by_default if limits.draw_length is None and given is None else given
        length = min(room, open_length or room)
        stops = False
        if limits.draw_length is not None:
            drawn = max(min_tokens, limits.draw_length(given, ignore_eos))
            length, stops = min(length, drawn), drawn < length
        lengths.append(length)
        early.append(stops)
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(each, str) and each for each in stop):
        raise ApiError(400, "stop: give a text or a list of texts", "stop")
    if len(stop) > MOST_STOPS:
        raise ApiError(400, f"stop: give at most {MOST_STOPS} texts", "stop")
    stop_ids = body.get("stop_token_ids") or []
    if not isinstance(stop_ids, list) or not all(_whole(each) for each in stop_ids):
        raise ApiError(400, "stop_token_ids: give a list of token ids", "stop_token_ids")
    ends = frozenset() if ignore_eos else codec.end_tokens
    top_k = _number(body, "top_k", 0, -1, math.inf, whole=True)
    seed = _number(body, "seed", None, -(1 << 63), (1 << 63) - 1, whole=True)
    sampling = SamplingParams(
        temperature=_number(body, "temperature", 1.0, 0, 2),
        top_k=max(0, top_k),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1),
        seed=None if seed is None else seed & ((1 << 63) - 1),
        logprobs=logprobs,
    )
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, 'stream_options: give an object such as {"include_usage": true}', "stream_options")
    each = _flag(options, "continuous_usage_stats", False)
    return Asked(
        prompts=prompts,
        n=n,
        output_tokens=lengths,
        stops_early=early,
        sampling=sampling,
        stop=() if limits.simulated else tuple(stop),
        stop_tokens=frozenset(stop_ids) | ends,
        min_tokens=min_tokens,
        stream=_flag(body, "stream", False),
        include_usage=_flag(options, "include_usage", False),
        usage_in_each_chunk=each,
        chat=chat,
        model=model or limits.models[0],
    )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} {value!r}: give true or false", name)
    return value


def _number(body: Mapping[str, Any], name: str, default: Any, low: float, high: float, *, whole: bool = False) -> Any:
    value = body.get(name)
    return default if value is None else _check_number(name, value, low, high, whole=whole)


def _check_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> Any:
    kinds = int if whole else (int, float)
    what = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        bounds = f"of {low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise ApiError(400, f"{name} {value!r}: give {what} {bounds}", name)
    return value
