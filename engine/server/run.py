"""Serving over HTTP until told to stop: SIGTERM or Ctrl-C lets what runs finish, a second one ends at once.

serve_http(server.app(), host="127.0.0.1", port=8000, on_ready=print)
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from engine.errors import InputError
from engine.runtime.network import allow_connections

MAX_HEADER_BYTES = 64 << 10
BACKLOG = 4096


class HttpServer:
    """Serves an ASGI application, in the main thread until a signal too. `stop` lets what runs finish."""

    def __init__(self, app: Any, host: str, port: int) -> None:
        import uvicorn

        self.socket = _listen(host, port)
        allow_connections()
        self.address = self.socket.getsockname()[:2]
        config = uvicorn.Config(
            app,
            http=_limited_protocol(),
            loop="uvloop",
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=60,
        )

        class Server(uvicorn.Server):
            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield  # uvicorn would raise them again at the end, before the run is written

        self._server = Server(config)

    def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`, SIGTERM or SIGINT. `on_ready` is called when it listens."""
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve(on_ready))

    def stop(self) -> None:
        """Take no more requests and end when those here have; when it does that already, end at once."""
        self._server.force_exit = self._server.should_exit
        self._server.should_exit = True

    async def _serve(self, on_ready: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(which, self.stop)
        serving = asyncio.ensure_future(self._server.serve(sockets=[self.socket]))
        while not self._server.started and not serving.done():
            await asyncio.sleep(0.005)
        if self._server.started:
            on_ready()
        await serving


def _listen(host: str, port: int) -> socket.socket:
    """Listen at an address. Raises InputError where that can't be."""
    if not 0 <= port < 1 << 16:  # getaddrinfo takes what is left of it
        raise InputError(f"--port {port}: give 0 to {(1 << 16) - 1}")
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        found = socket.socket(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"can't listen at {host}:{port} ({why}): give another --host or --port") from None
    return found


def _limited_protocol() -> Any:
    """Return uvicorn's fast protocol, with a limit on a request's headers, which it lacks."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Limited(HttpToolsProtocol):
        _in_headers = False
        _header_bytes = 0

        def on_message_begin(self) -> None:
            self._in_headers, self._header_bytes = True, 0
            super().on_message_begin()
            scope: dict[str, Any] = self.scope  # type: ignore[assignment]
            scope["arrived"] = perf_counter()  # parsing and waiting for the loop are part of what a client sees

        def on_headers_complete(self) -> None:
            self._in_headers = False
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_headers:
                self._header_bytes += len(data)
                if self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                    self.send_400_response(f"the headers are over {MAX_HEADER_BYTES >> 10} KiB")

    return Limited
