"""HTTP/1.1 as far as the local service speaks it: bytes to requests, answers to bytes, without a socket."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from fedge.errors import FedgeError

MAX_HEAD_BYTES: Final = 8 * 1024
MAX_HEADERS: Final = 64
_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_TARGET: Final = re.compile(rb"/[!-~]{0,2047}")
_LENGTH: Final = re.compile(r"\d{1,12}")
_LOCAL: Final = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?")
_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    411: "Length Required",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


class StatusError(FedgeError):
    """A request that is answered with an error status; the connection may be closed after it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Head:
    """A request without its body."""

    method: str
    path: str  # without the query
    headers: Mapping[str, str]  # names in lower case
    keep: bool  # the connection stays open after it

    @property
    def length(self) -> int:
        """Bytes of the body.

        Raises:
            StatusError: it says none, or in a way that is not read here.
        """
        if "transfer-encoding" in self.headers:
            raise StatusError(411, "bodies are sent whole, with Content-Length")
        text = self.headers.get("content-length")
        if text is None:
            if self.method == "POST":
                raise StatusError(411, "a POST needs Content-Length")
            return 0
        if not _LENGTH.fullmatch(text):
            raise StatusError(400, "Content-Length is no number")
        return int(text)

    @property
    def media_type(self) -> str:
        """Of the body, in lower case and without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


def read_head(data: bytes) -> Head:
    """The head of a request: everything up to the empty line, which is not among the bytes.

    Raises:
        StatusError: malformed.
    """
    line, *lines = data.split(b"\r\n")
    words = line.split(b" ")
    if len(words) != 3 or words[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise StatusError(400, "the first line must be METHOD PATH HTTP/1.1")
    if not _TOKEN.fullmatch(words[0]) or not _TARGET.fullmatch(words[1]):
        raise StatusError(400, "the first line must name a method and a path")
    if len(lines) > MAX_HEADERS:
        raise StatusError(431, f"more than {MAX_HEADERS} header lines")
    headers: dict[str, str] = {}
    for each in lines:
        name, colon, value = each.partition(b":")
        if not colon or not _TOKEN.fullmatch(name):
            raise StatusError(400, "a header line must be Name: value")
        key = name.decode("ascii").lower()
        if (
            key in headers
        ):  # two lengths or two hosts: what one reader takes for the body is another's request
            raise StatusError(400, f"header {key} is given twice")
        headers[key] = value.strip(b" \t").decode("latin-1")
    path = words[1].partition(b"?")[0].decode("ascii")
    said = headers.get("connection", "").lower()
    keep = said != "close" if words[2] == b"HTTP/1.1" else said == "keep-alive"
    return Head(words[0].decode("ascii"), path, headers, keep)


def check_local(head: Head) -> None:
    """Refuse what a page in a browser sends: programs of this device have no Origin, and name no other host.

    Stops a web page from asking the model through the browser of this device, and names of other hosts that
    were made to point here (DNS rebinding).

    Raises:
        StatusError: such a request.
    """
    if "origin" in head.headers:
        raise StatusError(403, "asked by a web page; only programs of this device may ask")
    host = head.headers.get("host", "localhost")
    if host and not _LOCAL.fullmatch(host.lower()):
        raise StatusError(403, "Host must be localhost")


def write_answer(status: int, value: Mapping[str, Any], *, keep: bool) -> bytes:
    """An answer with a JSON body."""
    body = json.dumps(value).encode("utf-8") + b"\n"
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "X-Content-Type-Options: nosniff",
        f"Connection: {'keep-alive' if keep else 'close'}",
    ]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body


def write_error(status: int, message: str, *, keep: bool = False) -> bytes:
    """An error as an answer."""
    return write_answer(status, {"error": {"status": status, "message": message}}, keep=keep)
