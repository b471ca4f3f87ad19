"""A file server on the loopback that a test makes misbehave, and a fetcher for it with what Python brings."""

from __future__ import annotations

import fcntl
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.request import Request, urlopen

from fedge_client.updater import Fetcher

BLOCK = 16 * 1024


class Server:
    """Serve a folder; `reset_after` bytes of body the connection is reset, hard."""

    def __init__(self, folder: Path, *, reset_after: int | None = None) -> None:
        self.folder, self.reset_after = folder, reset_after
        self.sent = 0  # bytes of bodies that went onto the wire
        self.paths: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.paths.append(request.path)
        file = self.folder / request.path.lstrip("/")
        if not file.is_file():
            request.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "bytes=0-"))
        offset = int(asked[1]) if asked else 0
        data = file.read_bytes()[offset:]
        request.send_response(206 if offset else 200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        given = 0
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            if self.reset_after is not None and given + len(block) > self.reset_after:
                self.sent -= _unsent(request.connection)  # a reset drops them here
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                request.connection.close()
                request.close_connection = True
                return
            request.wfile.write(block)
            given += len(block)
            self.sent += len(block)


def _unsent(connection: socket.socket) -> int:
    """Bytes that were given to a socket and that it has not sent yet (Linux: SIOCOUTQNSD)."""
    number: int = struct.unpack("i", fcntl.ioctl(connection, 0x894B, bytes(4)))[0]
    return number


def http(url: str) -> Fetcher:
    """Files below a URL."""

    def fetch(name: str, maximum: int, offset: int = 0, /) -> Iterator[bytes]:
        request = Request(f"{url}/{name}", headers={"Range": f"bytes={offset}-"})
        with urlopen(request, timeout=5) as answer:
            while block := answer.read1(BLOCK):
                yield block

    return fetch
