"""`fedge-client serve` in a process of its own: releases installed meanwhile, and hostile callers."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge_client.answers import tally
from fedge_client.cli import main

ROOT = Path(__file__).parents[3]
NAMES = ("zero", "one", "two")


def npy(x: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


class Up:
    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process, self.path = process, path

    def socket(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(30)
        made.connect(str(self.path))
        return made

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = self.socket()
        return connection

    @property
    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


def ask(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, Any]:
    connection.request("POST", "/v1/infer", body, {"Content-Type": "application/x-npy"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


@contextmanager
def serving(home: Path, *options: str) -> Iterator[Up]:
    env = {**os.environ, "PYTHONPATH": ":".join(str(ROOT / name) for name in ("common", "client"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "fedge_client", "serve", "--home", str(home), *options],
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stderr is not None
    try:
        while "listening" not in (line := process.stderr.readline()):
            assert line, "it ended"
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Up(process, home / "serving" / "http.sock")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(30)
        process.stderr.close()


def install(home: Path, publisher: Any, version: int) -> None:
    publisher.offer(version, answer=version % 3)
    folder = publisher.folder
    first = ["--tier", "micro", "--root", str(folder / "metadata" / "1.root.json")] if version == 1 else []
    assert main(["install", str(folder), "--home", str(home), *first]) == 0


@pytest.mark.slow
def test_a_release_that_is_installed_under_load_takes_over_and_no_request_is_lost(
    tmp_path: Path, publisher: Any
) -> None:
    home = tmp_path / "d"
    install(home, publisher, 1)
    seen: list[tuple[int, int, str]] = []
    stop = threading.Event()
    with serving(home, "--grpc", "off") as up:

        def asker() -> None:
            connection = up.connect()
            body = npy(np.zeros((2, 8, 8), np.uint8))
            while not stop.is_set():
                status, found = ask(connection, body)
                seen.append((status, found.get("release", 0), found["predictions"][1]["label"]))
            connection.close()

        askers = [threading.Thread(target=asker) for _ in range(3)]
        for thread in askers:
            thread.start()
        for version in range(2, 6):
            install(home, publisher, version)
            until = time.monotonic() + 30
            while not seen or seen[-1][1] != version:
                assert time.monotonic() < until
                time.sleep(0.01)
        stop.set()
        for thread in askers:
            thread.join()
    assert {status for status, _, _ in seen} == {200}
    counted = tally(home)
    assert (counted.version, counted.answers > 0) == (5, True)  # what the agent reports of the release
    assert counted.mean == pytest.approx(0.9647, abs=1e-3)
    assert [label for _, version, label in seen if label != NAMES[version % 3]] == []
    assert {version for _, version, _ in seen} == {1, 2, 3, 4, 5}


@pytest.mark.slow
def test_hostile_callers_take_bounded_memory_and_others_are_served(tmp_path: Path, publisher: Any) -> None:
    home = tmp_path / "d"
    install(home, publisher, 1)
    head = "POST /v1/infer HTTP/1.1\r\nContent-Type: application/x-npy\r\nContent-Length: {}\r\n\r\n"
    body = npy(np.zeros((256, 8, 8), np.uint8))
    trouble = {
        "silent": (1000, b""),
        "five megabytes": (100, head.format(5_000_000).encode() + bytes(60_000)),
        "four megabytes that do not end": (100, head.format(4_000_000).encode() + bytes(60_000)),
        "answers that nobody reads": (40, (head.format(len(body)).encode() + body) * 3),
    }
    with serving(home, "--grpc", "off") as up:
        rest = up.memory_mb
        for name, (count, data) in trouble.items():
            held = [up.socket() for _ in range(count)]
            for each in held:
                each.setblocking(False)
                with suppress(BlockingIOError, ConnectionError):
                    each.send(data)
            for _ in range(20):
                connection = up.connect()
                assert ask(connection, npy(np.zeros((8, 8), np.uint8)))[0] == 200, name
                connection.close()
            for each in held:
                each.close()
        assert up.memory_mb < rest + 100


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--http", "0.0.0.0:80"], "only this device may ask"),
        (["--http", "off", "--grpc", "off"], "give an address"),
        (["--threads", "0"], "--threads 0"),
        (["--deadline-ms", "0"], "deadline_s"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--home", str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err
