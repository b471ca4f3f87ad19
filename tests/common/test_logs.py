"""Records as lines of JSON, and the named records of security."""

from __future__ import annotations

import io
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedge import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the root logger goes; as it was afterwards."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers = []
    try:
        yield io.StringIO()
    finally:
        root.handlers, root.level = before, level


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_object_with_its_own_fields_and_those_of_the_process(stream: io.StringIO) -> None:
    logs.start("json", text=logging.Formatter("%(message)s"), stream=stream, run="run-1")
    about = {"round": 3, "loss": 0.5, "bad": math.nan, "who": Path("x"), "counted": True}
    logging.getLogger("fedge.run").info("round %d\nis over", 3, extra=about)
    (found,) = lines(stream)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(found.pop("time")))
    assert found == {
        "level": "info",
        "logger": "fedge.run",
        "message": "round 3\nis over",
        "run": "run-1",
        "round": 3,
        "loss": 0.5,
        "bad": "nan",
        "who": "x",
        "counted": True,
    }


def test_an_exception_stays_within_its_line(stream: io.StringIO) -> None:
    logs.start("json", text=logging.Formatter(), stream=stream)
    try:
        raise ValueError("no\nsuch thing")
    except ValueError:
        logging.getLogger("fedge.hub").exception("it failed")
    (found,) = lines(stream)
    assert found["level"] == "error"
    assert str(found["exception"]).endswith("ValueError: no\nsuch thing")


def test_plain_lines_stay_as_they_were(stream: io.StringIO) -> None:
    logs.start("text", text=logging.Formatter("%(levelname)s %(message)s"), stream=stream, run="run-1")
    logging.getLogger("fedge.hub").info("device %s left", "ab", extra={"device": "ab"})
    assert stream.getvalue() == "INFO device ab left\n"


def test_a_record_of_security_has_its_event_and_a_name_that_is_listed(stream: io.StringIO) -> None:
    logs.start("json", text=logging.Formatter(), stream=stream)
    logs.security("server_refused", "%s", "100%", device="ab", reason=None)
    (found,) = lines(stream)
    assert (found["logger"], found["level"], found["event"]) == (
        "fedge.security",
        "warning",
        "server_refused",
    )
    assert (found["message"], found["device"]) == ("100%", "ab")
    assert "reason" not in found
    with pytest.raises(ValueError, match="no event"):
        logs.security("sever_refused", "x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"time": "t", "message": "failed: no data"}', "failed: no data"),
        ("failed: no data", "failed: no data"),
        ('{"reason": 1}', '{"reason": 1}'),
        ("[1]", "[1]"),
        ("", ""),
    ],
)
def test_the_message_of_a_line_is_found_in_either_format(line: str, message: str) -> None:
    assert logs.message_of(line) == message
