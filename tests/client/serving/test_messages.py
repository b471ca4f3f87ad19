from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge_client.serving.messages import StatusError, check_local, read_head, write_answer


def test_a_head_is_method_path_and_headers_whose_names_have_no_case() -> None:
    head = read_head(
        b"POST /v1/infer?a=b HTTP/1.1\r\nHost: localhost\r\n"
        b"content-LENGTH: 12\r\nContent-Type: Image/PNG; q=1"
    )
    assert (head.method, head.path, head.length, head.media_type, head.keep) == (
        "POST",
        "/v1/infer",
        12,
        "image/png",
        True,
    )


@pytest.mark.parametrize(
    ("first", "extra", "keep"),
    [
        ("HTTP/1.1", "", True),
        ("HTTP/1.1", "close", False),
        ("HTTP/1.0", "", False),
        ("HTTP/1.0", "keep-alive", True),
    ],
)
def test_a_connection_stays_open_as_the_version_says(first: str, extra: str, keep: bool) -> None:
    line = f"\r\nConnection: {extra}" if extra else ""
    assert read_head(f"GET / {first}{line}".encode()).keep is keep


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"", 400),
        (b"GET /", 400),
        (b"GET / HTTP/2", 400),
        (b"GET x HTTP/1.1", 400),
        (b"G\x00T / HTTP/1.1", 400),
        (b"GET / HTTP/1.1\r\nno colon", 400),
        (b"GET / HTTP/1.1\r\n folded: x", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2", 400),
        (b"GET / HTTP/1.1" + b"\r\na: b" * 65, 431),
    ],
)
def test_a_malformed_head_is_refused(head: bytes, status: int) -> None:
    with pytest.raises(StatusError) as refused:
        read_head(head)
    assert refused.value.status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("", 411),
        ("\r\nTransfer-Encoding: chunked", 411),
        ("\r\nContent-Length: -1", 400),
        ("\r\nContent-Length: 1e3", 400),
    ],
)
def test_a_body_without_a_length_is_refused(headers: str, status: int) -> None:
    with pytest.raises(StatusError) as refused:
        _ = read_head(f"POST /v1/infer HTTP/1.1{headers}".encode()).length
    assert refused.value.status == status


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080", "127.1.2.3", "[::1]:80", "LOCALHOST"])
def test_programs_of_this_device_may_ask(host: str) -> None:
    check_local(read_head(f"GET / HTTP/1.1\r\nHost: {host}".encode()))


@pytest.mark.parametrize(
    "line", ["Host: evil.example", "Host: localhost.evil.example", "Origin: http://localhost"]
)
def test_web_pages_and_other_names_may_not(line: str) -> None:
    with pytest.raises(StatusError) as refused:
        check_local(read_head(f"GET / HTTP/1.1\r\n{line}".encode()))
    assert refused.value.status == 403


def test_an_answer_says_its_length() -> None:
    head, _, body = write_answer(200, {"a": 1}, keep=False).partition(b"\r\n\r\n")
    assert json.loads(body) == {"a": 1}
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"Connection: close" in head


def read(data: bytes) -> int:
    """200, or with what it is refused."""
    try:
        return 200 if read_head(data).length >= 0 else 0
    except StatusError as error:
        return error.status


@given(st.one_of(st.binary(max_size=300), st.text("GETPOS/ HTTP1.\r\n:ab-", max_size=200).map(str.encode)))
def test_whatever_comes_is_a_head_or_refused(data: bytes) -> None:
    assert read(data) in (200, 400, 411, 431)
