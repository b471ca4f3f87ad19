"""The fault proxy itself: what it is asked to do to a connection is what happens, and nothing else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from proxy import FaultProxy, Faults


class Echo:
    """A server that sends back what it gets."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    connection.sendall(data)
            except OSError:
                return  # reset by the proxy: what some tests are about

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    echo = Echo()
    with FaultProxy("127.0.0.1", echo.port) as proxy:
        yield proxy
    echo.close()


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def exchange(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    found = b""
    while len(found) < len(data):
        if not (part := connection.recv(65536)):
            break
        found += part
    return found


def is_cut(connection: socket.socket, data: bytes) -> bool:
    """Whether the other side drops the connection while this is sent to it, again and again."""
    try:
        while data and exchange(connection, data):
            pass
        return connection.recv(10) == b""
    except ConnectionError:
        return True


def test_without_faults_everything_passes_unchanged(proxy: FaultProxy) -> None:
    data = bytes(range(256)) * 2000
    with connect(proxy) as connection:
        assert exchange(connection, data) == data
    assert proxy.accepted == 1


def test_the_end_of_one_side_reaches_the_other(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"last words")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b"last words"
        assert connection.recv(100) == b""


def test_a_delay_comes_on_top_of_each_direction(proxy: FaultProxy) -> None:
    proxy.faults = Faults(delay_s=0.1)
    with connect(proxy) as connection:
        started = time.perf_counter()
        assert exchange(connection, b"x") == b"x"
    assert time.perf_counter() - started >= 0.2


@pytest.mark.slow
def test_a_rate_holds_for_a_connection(proxy: FaultProxy) -> None:
    proxy.faults = Faults(bytes_per_s=200_000)
    with connect(proxy) as connection:
        started = time.perf_counter()
        assert len(exchange(connection, bytes(60_000))) == 60_000
    assert time.perf_counter() - started >= 0.3


def test_a_connection_is_reset_once_it_has_carried_so_much(proxy: FaultProxy) -> None:
    proxy.faults = Faults(reset_after=10_000)
    with connect(proxy) as connection:
        assert exchange(connection, bytes(2000)) == bytes(2000)
        assert is_cut(connection, bytes(8000))


def test_a_connection_that_has_carried_its_bytes_holds_until_it_is_reset(proxy: FaultProxy) -> None:
    proxy.faults = Faults(hold_after=10_000)
    with connect(proxy) as connection:
        assert exchange(connection, b"." * 5000) == b"." * 5000
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            exchange(connection, b".")
        proxy.reset_all()
        assert is_cut(connection, b"")
    assert proxy.carried == 10_000


@pytest.mark.slow
def test_a_black_hole_takes_everything_and_answers_nothing(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        assert exchange(connection, b"before") == b"before"
        proxy.faults = Faults(swallow=True)
        connection.settimeout(0.3)
        connection.sendall(b"into the void")
        with pytest.raises(TimeoutError):
            connection.recv(100)


@pytest.mark.slow
def test_a_stalled_connection_goes_on_where_it_stopped(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        assert exchange(connection, b"before") == b"before"
        proxy.faults = Faults(stall=True)
        connection.settimeout(0.3)
        connection.sendall(b"during")
        with pytest.raises(TimeoutError):
            connection.recv(100)
        proxy.faults = Faults()
        connection.settimeout(10)
        assert connection.recv(100) == b"during"


@pytest.mark.parametrize("faults", [Faults(flip_up=1000), Faults(flip_down=1000)])
def test_one_bit_of_one_byte_is_flipped(proxy: FaultProxy, faults: Faults) -> None:
    proxy.faults = faults
    data = bytes(40_000)
    with connect(proxy) as connection:
        found = exchange(connection, data)
    assert [i for i in range(len(data)) if found[i] != data[i]] == [1000]
    assert found[1000].bit_count() == 1


def test_all_connections_can_be_reset_on_command(proxy: FaultProxy) -> None:
    with connect(proxy) as one, connect(proxy) as two:
        assert exchange(one, b"a") + exchange(two, b"b") == b"ab"
        proxy.reset_all()
        for connection in (one, two):
            assert is_cut(connection, b"")


def test_a_target_that_is_not_there_closes_the_connection(proxy: FaultProxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    proxy.retarget("127.0.0.1", free)
    with connect(proxy) as connection:
        assert connection.recv(10) == b""
