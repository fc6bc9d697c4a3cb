"""An OpenAI endpoint, as a load generator sees it: what it says of itself, and a request whose answer is streamed."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from engine.errors import InputError
from engine.runtime.network import allow_connections

if TYPE_CHECKING:
    import aiohttp

CONNECT_S = 10.0
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(slots=True)
class Answer:
    """What came of a request. Times are of time.perf_counter."""

    sent_at: float
    times: list[float] = field(default_factory=list)  # of each event with text
    text: list[str] = field(default_factory=list)
    ended_at: float = 0.0
    prompt_tokens: int | None = None  # as the server counts
    output_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class ServerFacts:
    """What a server says of itself; None where it does not."""

    url: str
    models: tuple[str, ...]
    max_model_len: int | None = None
    version: str | None = None
    simulated: bool | None = None
    block_size: int | None = None
    num_gpu_blocks: int | None = None
    num_replicas: int | None = None


class Endpoint:
    """A server's base URL, such as http://127.0.0.1:8000 (a /v1 at its end is as good), used as a context manager.

    `flag` is what the user gave the URL by, for errors.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        chat: bool = False,
        flag: str = "--url",
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise InputError(f"{flag} {url!r}: give an address such as http://127.0.0.1:8000")
        if not timeout_s > 0:
            raise InputError(f"--timeout {timeout_s}: give seconds above 0")
        self.base = url.rstrip("/").removesuffix("/v1")
        self.chat = chat
        self._flag = flag
        self.timeout_s = timeout_s
        self._path = f"{self.base}/v1/{'chat/completions' if chat else 'completions'}"
        self._headers = {"content-type": "application/json"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"

    async def __aenter__(self) -> Endpoint:
        import aiohttp

        allow_connections()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=None),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=self.timeout_s),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def facts(self) -> ServerFacts:
        """Ask the server what it is. Raises InputError where there is none, or none of this kind."""
        import aiohttp

        try:
            async with self._session.get(f"{self.base}/v1/models") as response:
                text = await response.text()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise InputError(
                f"there is no server at {self.base} ({_words(error)}): start one, or give another {self._flag}"
            ) from None
        if response.status == 401:
            raise InputError(f"{self.base} wants a key: give --api-key")
        try:
            models = [entry for entry in json.loads(text)["data"] if entry["id"]]
        except (ValueError, LookupError, TypeError):
            models = []
        if response.status != 200 or not models:
            raise InputError(f"{self.base}/v1/models answers {response.status} and names no model: is it an OpenAI "
                             "endpoint?")  # fmt: skip
        about = await self._get_json("/version")
        gauges = parse_metrics(await self.metrics() or "")
        caches = [labels for name, labels, _ in gauges if name == "vllm:cache_config_info"]
        cache = caches[0] if caches else {}
        return ServerFacts(
            url=self.base,
            models=tuple(entry["id"] for entry in models),
            max_model_len=_int(models[0].get("max_model_len")),
            version=about.get("version"),
            simulated=about.get("simulated"),
            block_size=_int(cache.get("block_size")),
            num_gpu_blocks=_int(cache.get("num_gpu_blocks")),
            num_replicas=len(caches) or None,
        )

    async def metrics(self) -> str | None:
        """Return the page of /metrics; None where there is none."""
        return await self._get_text("/metrics")

    def body(self, model: str, prompt: str, output_tokens: int, more: Mapping[str, Any]) -> bytes:
        """Return the body of a request for at most so many tokens."""
        what: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        return json.dumps(
            {
                "model": model,
                **what,
                "max_tokens": output_tokens,
                "temperature": 0.0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **more,
            }
        ).encode()

    async def send(self, body: bytes) -> Answer:
        """Send a request and read its answer as it comes. What goes wrong is in the answer's `error`."""
        import aiohttp

        answer = Answer(perf_counter())
        try:
            async with self._session.post(self._path, data=body) as response:
                if response.status != 200:
                    answer.error = _said(response.status, await response.text())
                else:
                    await self._read(response, answer)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, LookupError, TypeError) as error:
            late = isinstance(error, TimeoutError)
            answer.error = f"nothing came for {self.timeout_s:g} s" if late else _words(error)
        answer.ended_at = perf_counter()
        return answer

    async def _read(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        """Read a stream of events to its end."""
        rest, finished = b"", False
        content = response.content
        while data := await content.readany():
            now = perf_counter()
            *events, rest = (rest + data.replace(b"\r\n", b"\n")).split(b"\n\n")
            for event in events:
                if not event.startswith(b"data:"):
                    continue
                if (said := event[5:].strip()) == b"[DONE]":
                    finished = True
                    continue
                found = json.loads(said)
                if "error" in found:
                    error = found["error"]
                    answer.error = str(error.get("message", error) if isinstance(error, dict) else error)[:200]
                    return
                if used := found.get("usage"):
                    answer.prompt_tokens, answer.output_tokens = used["prompt_tokens"], used["completion_tokens"]
                for choice in found.get("choices") or ():
                    text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
                    if text:
                        answer.times.append(now)
                        answer.text.append(text)
                    finished = finished or choice.get("finish_reason") is not None
        if not finished:
            answer.error = "the stream ended before the answer did"
        elif not answer.times:
            answer.error = "the answer has no text"

    async def _get_text(self, path: str) -> str | None:
        import aiohttp

        try:
            async with self._session.get(self.base + path) as response:
                return await response.text() if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError, UnicodeDecodeError):
            return None

    async def _get_json(self, path: str) -> dict[str, Any]:
        try:
            found = json.loads(await self._get_text(path) or "{}")
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}


def parse_metrics(page: str) -> list[tuple[str, dict[str, str], float]]:
    """Read Prometheus's text format: name, labels and value of each sample."""
    found = []
    for line in page.splitlines():
        if line.startswith("#") or (match := _SAMPLE.match(line)) is None:
            continue
        try:
            value = float(match["value"])
        except ValueError:
            continue
        found.append((match["name"], dict(_LABEL.findall(match["labels"] or "")), value))
    return found


async def all_done(tasks: set[asyncio.Task[None]]) -> None:
    """Wait for tasks, whatever comes of them."""
    if tasks:
        await asyncio.wait(tasks)


def _said(status: int, text: str) -> str:
    """What an answer says that is an error."""
    try:
        error = json.loads(text)["error"]
        message = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError):
        message = " ".join(text.split())
    return f"status {status}: {str(message)[:200]}"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _int(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
