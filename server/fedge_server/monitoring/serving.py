"""Answer Prometheus over plain HTTP, in threads of its own: a scrape, or a hundred, hold up no device."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from fedge.errors import FedgeError
from fedge.identity import address

AT_ONCE: Final = 4  # answers under way; a further one is turned away at once
STALLED_S: Final = 10.0  # for whoever sends or takes nothing
Start = Callable[..., Any]

_log = logging.getLogger("fedge.hub")


class Exporter:
    """An HTTP server for one registry; `stop` ends it.

    Args:
        host: to listen on.
        port: 0: any free one.
        registry: what is told.

    Raises:
        FedgeError: the port is taken, or there is no such address here.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        try:
            self._server = _Server(host, port)
        except OSError as error:
            where = address(host, port)
            raise FedgeError(
                f"metrics: cannot listen on {where} ({error.strerror}); is the port taken?"
            ) from error
        self._server.set_app(_guarded(make_wsgi_app(registry)))
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Take no more questions."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_port = False

    def __init__(self, host: str, port: int) -> None:
        self._room = threading.BoundedSemaphore(AT_ONCE)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Without asking the network for this host's name, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "fedge", self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread, if there is room for one more."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """In its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked has gone, or stalled: nobody is left to tell."""


class _Handler(WSGIRequestHandler):
    timeout = STALLED_S  # of socket operations

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has there
        """A scrape every few seconds is not worth a line."""


def _guarded(app: Callable[[dict[str, Any], Start], Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """The app at `/metrics` alone; where something cannot be looked up, Prometheus sees a failed scrape."""

    def answer(environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/metrics":
            return _plain(start, "404 Not Found", "there is /metrics and nothing else\n")
        try:
            return app(environ, start)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next scrape may succeed
            _log.error("metrics cannot be told: %s: %s", type(error).__name__, error)
            return _plain(start, "503 Service Unavailable", "the hub cannot tell now; see its log\n")

    return answer


def _plain(start: Start, status: str, text: str) -> list[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode()]
