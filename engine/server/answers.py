"""The bodies of answers, whole or in server-sent events, as OpenAI's API has them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from engine.runtime.executor import Logprobs
from engine.server.requests import Asked
from engine.server.text import TextCodec

DONE = b"data: [DONE]\n\n"


def usage(prompt_tokens: int, output_tokens: int) -> dict[str, int]:
    """Return the token counts of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }


def whole(asked: Asked, id: str, created: int, choices: Sequence[dict[str, Any]], used: dict[str, int]) -> bytes:
    """Return the body of an answer that is not streamed."""
    body = {
        "id": id,
        "object": "chat.completion" if asked.chat else "text_completion",
        "created": created,
        "model": asked.model,
        "choices": list(choices),
        "usage": used,
    }
    return json.dumps(body).encode()


def choice(asked: Asked, index: int, text: str, logprobs: dict[str, Any] | None, reason: str) -> dict[str, Any]:
    """Return one of an answer's choices."""
    said = {"message": {"role": "assistant", "content": text}} if asked.chat else {"text": text}
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}


class Chunks:
    """Writes the events of one stream. What stays the same in each is written once."""

    def __init__(self, asked: Asked, id: str, created: int) -> None:
        kind = "chat.completion.chunk" if asked.chat else "text_completion"
        self._chat = asked.chat
        head = {"id": id, "object": kind, "created": created, "model": asked.model}
        self._head = "data: " + json.dumps(head)[:-1]
        self._middle = ',"delta":{"content":' if asked.chat else ',"text":'
        self._after = "}" if asked.chat else ""

    def role(self, index: int) -> bytes:
        """Return the event that begins a chat's answer."""
        delta = '{"role":"assistant","content":""}'
        choice = f'{{"index":{index},"delta":{delta},"logprobs":null,"finish_reason":null}}'
        return f'{self._head},"choices":[{choice}]}}\n\n'.encode()

    def text(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        reason: str | None,
        used: dict[str, int] | None,
    ) -> bytes:
        """Return an event with more text."""
        end = "null" if reason is None else f'"{reason}"'
        probabilities = "null" if logprobs is None else json.dumps(logprobs)
        tail = "" if used is None else f',"usage":{json.dumps(used)}'
        return (
            f'{self._head},"choices":[{{"index":{index}{self._middle}{json.dumps(text)}{self._after},'
            f'"logprobs":{probabilities},"finish_reason":{end}}}]{tail}}}\n\n'
        ).encode()

    def usage(self, used: dict[str, int]) -> bytes:
        """Return the event that counts the tokens, the last before the end."""
        return f'{self._head},"choices":[],"usage":{json.dumps(used)}}}\n\n'.encode()

    @staticmethod
    def error(body: dict[str, Any]) -> bytes:
        """Return the event of what went wrong meanwhile."""
        return f"data: {json.dumps(body)}\n\n".encode()


def logprobs_of(
    asked: Asked, codec: TextCodec, tokens: Sequence[int], found: Sequence[Logprobs], offset: int
) -> dict[str, Any]:
    """Return log probabilities as OpenAI has them; `offset` is where the tokens' text begins in the output."""
    if asked.chat:
        return {"content": [_of_chat(codec, token, each) for token, each in zip(tokens, found, strict=True)]}
    texts = [codec.token_text(token) for token in tokens]
    offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
    tops: list[dict[str, float]] = []
    for text, each in zip(texts, found, strict=True):
        tops.append({codec.token_text(token): value for token, value in reversed(each.top)} | {text: each.chosen})
    return {
        "tokens": texts,
        "token_logprobs": [each.chosen for each in found],
        "top_logprobs": tops if asked.sampling.logprobs else None,
        "text_offset": offsets,
    }


def _of_chat(codec: TextCodec, token: int, found: Logprobs) -> dict[str, Any]:
    top = [_one(codec.token_text(other), value) for other, value in found.top]
    return {**_one(codec.token_text(token), found.chosen), "top_logprobs": top}


def _one(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
