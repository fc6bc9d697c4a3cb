"""An OpenAI-compatible server over a `Backend`: completions and chats, streamed or whole, models, health, metrics.

    app = Server(backend, codec, limits).app()

Handlers live in one event loop. The tokens of a request come on its channel; whoever goes away is let go of, with its
KV blocks. Everything a client can do wrong is answered by OpenAI's error body.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from importlib.metadata import version
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from engine.errors import InputError
from engine.runtime.sequences import Sequence
from engine.scheduling.request import Request
from engine.server.answers import DONE, Chunks, choice, logprobs_of, usage, whole
from engine.server.live import Backend, Channel, Event
from engine.server.metrics import Metrics
from engine.server.requests import ApiError, Asked, Limits, read_chat, read_completion
from engine.server.text import Decoder, TextCodec

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_QUEUE = 4096  # requests that wait, by default
MAX_BODY_BYTES = 32 << 20
RETRY_S = 1  # after which a client turned away may come again
_EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


class _Choice:
    """One sequence of a request, and its text as far as it is known."""

    __slots__ = ("decoder", "finish_reason", "held", "place", "said", "sent", "sequence", "stops_early", "tokens")

    def __init__(self, place: int, sequence: Sequence, decoder: Decoder, stops_early: bool) -> None:
        self.place = place
        self.sequence = sequence
        self.decoder = decoder
        self.stops_early = stops_early
        self.finish_reason: str | None = None
        self.tokens: list[int] = []  # that it has been given
        self.sent = 0  # tokens whose log probabilities were given out
        self.said = ""  # the text so far
        self.held = ""  # the end of the text that may be the beginning of a stop text

    def take(self, event: Event, asked: Asked) -> str:
        """Take in a token and return the text that may be given out now."""
        self.tokens.append(event.token)
        reason = event.finish_reason
        at_end = reason == "stop" and event.token in self.sequence.stop_tokens
        text = "" if at_end else self.decoder.add(event.token)
        if reason is not None:
            text += self.decoder.rest()
            self.finish_reason = "stop" if self.stops_early else reason
        if not asked.stop:
            return text
        text = self.held + text
        self.held = ""
        if len(self.tokens) >= asked.min_tokens:
            found = [place for stop in asked.stop if (place := text.find(stop)) >= 0]
            if found:
                self.finish_reason = "stop"
                return text[: min(found)]
        if self.finish_reason is None:
            keep = max(_overlap(text, stop) for stop in asked.stop)
            text, self.held = text[: len(text) - keep], text[len(text) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Server:
    """Answers requests from a backend.

    Args:
        max_queue: requests that may wait; more are turned away with status 503.
        api_key: what a client has to bring; None lets everybody in.
    """

    def __init__(
        self,
        backend: Backend,
        codec: TextCodec,
        limits: Limits,
        *,
        max_queue: int = MAX_QUEUE,
        api_key: str | None = None,
    ) -> None:
        if max_queue < 1:
            raise InputError(f"max_queue {max_queue}: give at least 1")
        self.backend = backend
        self.codec = codec
        self.limits = limits
        self.max_queue = max_queue
        self.api_key = api_key
        self.metrics = Metrics(limits.models[0], backend.gauges)
        self.started_at = int(time.time())
        self.num_requests = 0  # sequences that were taken in
        self.num_aborted = 0  # of them, those whose client went away
        self._ids = count()

    def app(self) -> FastAPI:
        """Make the ASGI application."""
        from fastapi import FastAPI
        from starlette.exceptions import HTTPException
        from starlette.responses import Response
        from starlette.routing import Route

        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            self.backend.start(asyncio.get_running_loop())
            yield

        async def unknown_path(request: HttpRequest, error: Exception) -> Response:
            status = getattr(error, "status_code", 500)
            return _error(ApiError(status, f"{request.method} {request.url.path}: {getattr(error, 'detail', error)}"))

        async def broken(request: HttpRequest, error: Exception) -> Response:
            return _error(ApiError(500, f"the server failed: {type(error).__name__}"))

        def completion(read: Callable[..., Asked]) -> Callable[[HttpRequest], Awaitable[Response]]:
            async def answer(request: HttpRequest) -> Response:
                try:
                    return await self._answer(request, read)
                except ApiError as error:
                    return _error(error)

            return answer

        async def models(request: HttpRequest) -> Response:
            return _json({"object": "list", "data": [self._model(name) for name in self.limits.models]})

        async def model(request: HttpRequest) -> Response:
            name = request.path_params["name"]
            if name not in self.limits.models:
                return _error(ApiError(404, f"The model `{name}` does not exist", "model", "model_not_found"))
            return _json(self._model(name))

        async def health(request: HttpRequest) -> Response:
            return Response(status_code=503 if self.backend.error else 200)

        async def about(request: HttpRequest) -> Response:
            about = {"version": version("windtunnel"), "engine": "windtunnel", "simulated": self.limits.simulated}
            return _json(about | ({"prompts": self.codec.description} if self.codec.description else {}))

        async def metrics(request: HttpRequest) -> Response:
            return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

        app = FastAPI(
            openapi_url=None,
            lifespan=lifespan,
            routes=[
                Route("/v1/completions", completion(read_completion), methods=["POST"]),
                Route("/v1/chat/completions", completion(read_chat), methods=["POST"]),
                Route("/v1/models", models),
                Route("/v1/models/{name:path}", model),
                Route("/health", health),
                Route("/version", about),
                Route("/metrics", metrics),
            ],
            exception_handlers={HTTPException: unknown_path, Exception: broken},
        )
        if self.api_key is not None:
            app.add_middleware(_WithKey, key=self.api_key)
        return app

    # -- inside ----------------------------------------------------------------------------------------------------

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started_at,
            "owned_by": "windtunnel",
            "root": name,
            "parent": None,
            "max_model_len": self.limits.max_model_len,
        }

    async def _answer(self, request: HttpRequest, read: Callable[..., Asked]) -> Response:
        from starlette.responses import Response

        arrived = request.scope.get("arrived", perf_counter())
        asked = read(await _read_json(request), self.codec, self.limits)
        channel, choices = self._submit(asked, arrived)
        id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid4().hex}"
        created = int(time.time())
        if asked.stream:
            return _EventStream(self, asked, channel, choices, Chunks(asked, id, created))  # type: ignore[return-value]
        leaving = asyncio.ensure_future(_gone(request.receive))
        collecting = asyncio.ensure_future(self._collect(asked, channel, choices))
        try:
            await asyncio.wait((leaving, collecting), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=499)  # to nobody
            return Response(whole(asked, id, created, *collecting.result()), media_type="application/json")
        finally:
            leaving.cancel()
            collecting.cancel()
            self.let_go(choices)

    def _submit(self, asked: Asked, arrived: float) -> tuple[Channel, list[_Choice]]:
        """Give a request's sequences to the backend. Raises ApiError where that can't be."""
        if self.backend.error is not None:
            raise ApiError(500, f"the engine failed: {self.backend.error}")
        waiting = sum(each.waiting for each in self.backend.gauges())
        if waiting >= self.max_queue:
            full = ApiError(503, f"{waiting} requests are waiting already: come again later", code="overloaded")
            full.headers["retry-after"] = str(RETRY_S)
            raise full
        choices: list[_Choice] = []
        for prompt, length, early in zip(asked.prompts, asked.output_tokens, asked.stops_early, strict=True):
            for _ in range(asked.n):
                request = Request(next(self._ids), 0.0, len(prompt), length)
                sequence = Sequence(request, prompt, asked.sampling, asked.stop_tokens, asked.min_tokens)
                choices.append(_Choice(len(choices), sequence, self.codec.decoder(), early))
        try:
            for each in choices:
                self.backend.check(each.sequence.request)
        except InputError as error:
            raise ApiError(400, str(error)) from None
        channel = Channel()
        for each in choices:
            self.backend.submit(each.sequence, channel, each.place, arrived)
        self.num_requests += len(choices)
        return channel, choices

    async def _collect(
        self, asked: Asked, channel: Channel, choices: list[_Choice]
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Wait for the whole answer: its choices and its usage."""
        async for news in self.news(asked, channel, choices):
            for each, text in news:
                each.said += text
        answers = []
        for each in choices:
            found = each.sequence.logprobs[: len(each.tokens)]
            logprobs = logprobs_of(asked, self.codec, each.tokens, found, 0) if found else None
            answers.append(choice(asked, each.place, each.said, logprobs, each.finish_reason or "stop"))
        return answers, _used(asked, choices)

    async def news(
        self, asked: Asked, channel: Channel, choices: list[_Choice]
    ) -> AsyncIterator[list[tuple[_Choice, str]]]:
        """Yield what has come since: whose it is and its text. Ends with the last sequence.

        Raises ApiError if the engine fails.
        """
        left, last = len(choices), [0.0] * len(choices)
        metrics = self.metrics
        while left:
            news: list[tuple[_Choice, str]] = []
            for event in await channel.take():
                each = choices[event.place]
                if each.finish_reason is not None:
                    continue
                if event.error is not None:
                    raise ApiError(500, f"the engine failed: {event.error}")
                if each.tokens:
                    metrics.itl.observe(event.time - last[event.place])
                else:
                    metrics.ttft.observe(event.time - each.sequence.request.arrived_at)
                last[event.place] = event.time
                metrics.generation_tokens.inc()
                text = each.take(event, asked)
                if each.finish_reason is not None:
                    left -= 1
                    if event.finish_reason is None:
                        self.backend.stop(each.sequence.request.id, len(each.tokens))
                    metrics.finished(each.sequence.request, each.finish_reason, len(each.tokens))
                news.append((each, text))
            yield news

    def let_go(self, choices: list[_Choice]) -> None:
        """Abort what has not finished: its client is gone."""
        for each in choices:
            if each.finish_reason is None:
                each.finish_reason = "abort"
                self.num_aborted += 1
                self.backend.abort(each.sequence.request.id)
                self.metrics.finished(each.sequence.request, "abort", len(each.tokens))


class _EventStream:
    """The answer of a streamed request, an ASGI response: an event for all that has come of a sequence by then."""

    background = None  # starlette looks at it

    def __init__(self, server: Server, asked: Asked, channel: Channel, choices: list[_Choice], chunks: Chunks) -> None:
        self._server, self._asked, self._channel = server, asked, channel
        self._choices, self._chunks = choices, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((leaving, writing), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            leaving.cancel()
            writing.cancel()
            self._server.let_go(self._choices)

    async def _write(self, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in _EVENTS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await self._write_news(send)
        except ApiError as error:
            await _send(send, self._chunks.error(error.body))
        await send({"type": "http.response.body", "body": DONE, "more_body": False})

    async def _write_news(self, send: Send) -> None:
        asked, choices, chunks = self._asked, self._choices, self._chunks
        if asked.chat:
            await _send(send, b"".join(chunks.role(index) for index in range(len(choices))))
        async for news in self._server.news(asked, self._channel, choices):
            texts: dict[_Choice, str] = {}
            for each, text in news:
                texts[each] = texts.get(each, "") + text
            body = b""
            for each, text in texts.items():
                logprobs = None
                if asked.sampling.logprobs is not None:
                    tokens = each.tokens[each.sent :]
                    found = each.sequence.logprobs[each.sent : len(each.tokens)]
                    logprobs = logprobs_of(asked, self._server.codec, tokens, found, len(each.said))
                    each.sent = len(each.tokens)
                    each.said += text
                used = _used(asked, choices) if asked.usage_in_each_chunk else None
                body += chunks.text(each.place, text, logprobs, each.finish_reason, used)
            if body:
                await _send(send, body)
        if asked.include_usage:
            await _send(send, chunks.usage(_used(asked, choices)))


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


class _WithKey:
    """Lets nobody under /v1 who does not bring the key."""

    def __init__(self, app: Any, key: str) -> None:
        self._app = app
        self._wanted = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            brought = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(brought, self._wanted):
                wrong = ApiError(401, "give the server's API key: Authorization: Bearer KEY", code="invalid_api_key")
                await _error(wrong)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _used(asked: Asked, choices: list[_Choice]) -> dict[str, int]:
    return usage(sum(map(len, asked.prompts)), sum(len(each.tokens) for each in choices))


async def _gone(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_json(request: HttpRequest) -> dict[str, Any]:
    """Read a request's body. Raises ApiError if it is too long or holds no JSON object."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is over {MAX_BODY_BYTES >> 20} MiB: send less")
    try:
        found = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ApiError(400, 'the body is no JSON object: give {"model": ...}')
    return found


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    from starlette.responses import Response

    return Response(json.dumps(body), status, headers, "application/json")


def _error(error: ApiError) -> Response:
    return _json(error.body, error.status, error.headers)
