"""The distribution service under load, beside nginx; and what deltas take.

Everything runs on this machine, over loopback: the hub (a process that `fedge-server up` makes), the load
(one process more) and nginx share its processors. Parts:

    load    200 devices fetch 5 MB each, over mutual TLS and a new connection each, all at once; the same
            bytes from nginx (Debian's, one worker, mutual TLS, HTTP/1.1), in turns. The hub's memory is the
            highest that it has ever taken
    stall   polls of one device while 12 others have begun to read 128 MB and take no more
    storm   1,000 new connections, all at once, each with a poll
    deltas  see _distribution_deltas.py; takes your own copy of the data (`--data-dir DIR` with
            `fashion_mnist.npz`)

Clients are not alike: ours are gRPC's in Python, those of nginx are OpenSSL's through Python's ssl in
8 threads, which cost less; so the seconds of processors of each side stand beside the rates.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import _faults  # noqa: F401 - makes federation importable
from _harness import Options, Row, machine, options, publish
from _stubs import raise_file_limit, register
from federation import Federation, children, cpu_s, memory_mb, wait_for

from fedge_server.identity.authority import Authority

PARTS = ("load", "stall", "storm", "deltas")
DEVICES, FILE_MB, LARGE_MB, STALLED, POLLS, CONNECTIONS = 200, 5, 128, 12, 100, 1000
TURNS, QUICK_TURNS = 5, 2
MODEL, LARGE = "targets/edge/" + "a" * 64 + ".1.model", "targets/edge/" + "b" * 64 + ".1.model"
LIMIT_S = 120

NGINX = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {tls}/server.pem;
        ssl_certificate_key {tls}/server.pem;
        ssl_client_certificate {folder}/bundle.pem;
        ssl_verify_client on;
        ssl_session_cache off;
        root {root};
    }}
}}
"""


def file_of(path: Path, megabytes: int) -> int:
    """Random bytes in a file, and how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1_000_000))
    return megabytes * 1_000_000


class Bench:
    """A hub with a repository and the devices that it knows, and how a load is put on it."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self.devices: list[tuple[str, str]] = []
        self.sizes: dict[str, int] = {}

    def fill(self, federation: Federation) -> None:
        """Before the hub is up: it reads its devices when it starts."""
        self.devices = register(federation, DEVICES)
        repository = federation.home / "repository"
        shutil.rmtree(
            repository, ignore_errors=True
        )  # a publisher would remove what its metadata does not name
        self.sizes = {
            MODEL: file_of(repository / MODEL, FILE_MB),
            LARGE: file_of(repository / LARGE, LARGE_MB),
        }

    @property
    def pid(self) -> int:
        """Of the hub."""
        assert self._federation.hub is not None
        return self._federation.hub.pid

    @property
    def home(self) -> Path:
        """The server's."""
        return self._federation.home

    def load(self, part: str, count: int, name: str = MODEL, *, address: str = "") -> dict[str, float]:
        """One part of the load in a process of its own, and the CPU seconds of the hub meanwhile."""
        told = {
            "address": address or self._federation.link_address,
            "bundle": self.bundle,
            "devices": self.devices,
            "count": count,
            "name": name,
            "bytes": self.sizes[name],
            "polls": POLLS,
            "pair": str(self._federation.folder / "pair.pem"),
        }
        path = self._federation.folder / "told.json"
        path.write_text(json.dumps(told))
        before = cpu_s(self.pid)
        script = Path(__file__).with_name("_distribution_load.py")
        command = [sys.executable, str(script), part, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"load {part} failed:\n{done.stderr[-2000:]}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return {**found, "server_cpu_s": cpu_s(self.pid) - before}

    @property
    def bundle(self) -> str:
        """The CAs that devices trust."""
        return Authority.open(self.home / "ca").bundle.decode()


@contextmanager
def up() -> Iterator[Bench]:
    """A hub that is up, in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="fedge-distribution-") as name:
        federation = Federation(Path(name), 0)
        bench = Bench(federation)
        federation.before_up = bench.fill
        with federation:
            yield bench


@contextmanager
def nginx(bench: Bench) -> Iterator[tuple[str, int]]:
    """Nginx over the same repository and certificates; its address and the process of its worker."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    with tempfile.TemporaryDirectory(prefix="fedge-nginx-") as name:
        folder, port = Path(name), free_port()
        (folder / "bundle.pem").write_text(bench.bundle)
        key, certificate = bench.devices[0]
        (bench.home.parent / "pair.pem").write_text(key + certificate)
        fields = {
            "folder": folder,
            "port": port,
            "tls": bench.home / "tls",
            "root": bench.home / "repository",
        }
        user = "user root;\n" if os.getuid() == 0 else ""
        (folder / "nginx.conf").write_text(user + NGINX.format(**fields))
        process = subprocess.Popen(
            [program, "-p", name, "-c", str(folder / "nginx.conf")], stderr=subprocess.DEVNULL
        )
        try:
            wait_for(lambda: children(process.pid), "nginx has a worker", 10)
            time.sleep(0.2)
            yield f"127.0.0.1:{port}", children(process.pid)[0]
        finally:
            process.terminate()
            process.wait(10)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def row(part: str, what: str, found: Mapping[str, float], names: Mapping[str, str]) -> list[Row]:
    """A line for each figure."""
    return [
        {"part": part, "of": what, "what": text, "value": found[name]}
        for name, text in names.items()
        if name in found
    ]


RATE = {"mb_per_s": "MB/s", "server_cpu_s": "server's CPU s", "client_cpu_s": "clients' CPU s"}


def measure_load(bench: Bench, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """Ours and nginx in turns."""
    ours, theirs = list[dict[str, float]](), list[dict[str, float]]()
    with nginx(bench) as (address, worker):
        for _ in range(QUICK_TURNS if quick else TURNS):
            ours.append(bench.load("fetch", DEVICES))
            before = cpu_s(worker)
            found = bench.load("https", DEVICES, address=address)
            theirs.append({**found, "server_cpu_s": cpu_s(worker) - before})
        nginx_mb = memory_mb(worker, "VmHWM")
    peak = memory_mb(bench.pid, "VmHWM")

    def median(runs: list[dict[str, float]]) -> dict[str, float]:
        return {name: statistics.median(each[name] for each in runs) for name in RATE}

    of_ours, of_theirs = median(ours), median(theirs)
    gigabytes = DEVICES * bench.sizes[MODEL] / 1e9
    rows = row("load", "fedge", {**of_ours, "mb": peak}, {**RATE, "mb": "server's highest memory, MB"})
    rows += row("load", "nginx", {**of_theirs, "mb": nginx_mb}, {**RATE, "mb": "server's highest memory, MB"})
    ratios = [mine["mb_per_s"] / other["mb_per_s"] for mine, other in zip(ours, theirs, strict=True)]
    claims = {
        "mb_per_s": of_ours["mb_per_s"],
        "server_mb": peak,
        "ratio_to_nginx": statistics.median(ratios),
        "server_cpu_s_per_gb": of_ours["server_cpu_s"] / gigabytes,
        "server_cpu_ratio_to_nginx": of_ours["server_cpu_s"] / of_theirs["server_cpu_s"],
    }
    return claims, rows


def measure_stall(bench: Bench, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """The worst poll of a hundred."""
    found = bench.load("stalled", STALLED, LARGE)
    names = {
        "quiet_median_ms": "poll, ms, before",
        "quiet_worst_ms": "worst of 100 polls, ms, before",
        "median_ms": "poll, ms",
        "worst_ms": "worst of 100 polls, ms",
    }
    return {"stalled_poll_ms": found["worst_ms"]}, row("stall", f"{STALLED} who stall", found, names)


def measure_storm(bench: Bench, quick: bool) -> tuple[dict[str, float], list[Row]]:
    """The median of some storms."""
    found = [bench.load("storm", CONNECTIONS) for _ in range(1 if quick else 3)]
    names = {
        "p50_s": "median, s",
        "p99_s": "99 of 100 answered, s",
        "worst_s": "all answered, s",
        "server_cpu_s": "server's CPU s",
        "client_cpu_s": "clients' CPU s",
    }
    middle = {name: statistics.median(each[name] for each in found) for name in names}
    return {"storm_p99_s": middle["p99_s"]}, row("storm", f"{CONNECTIONS} connections", middle, names)


def main(asked: Options) -> None:
    """Measure, print, write."""
    raise_file_limit()
    before, claims, rows = machine(), dict[str, float](), list[Row]()
    parts = {"load": measure_load, "stall": measure_stall, "storm": measure_storm}
    chosen = [part for part in PARTS if part in (asked.only or PARTS)]
    if set(chosen) & set(parts):
        with up() as bench:
            for part in chosen:
                if part in parts:
                    found, lines = parts[part](bench, asked.quick)
                    claims |= found
                    rows += lines
    if "deltas" in chosen:
        from _distribution_deltas import measured

        with tempfile.TemporaryDirectory(prefix="fedge-deltas-") as scratch:
            found, lines = measured(asked.data, Path(scratch), quick=asked.quick)
        claims |= found
        rows += lines
    publish(asked, before, claims, rows)


if __name__ == "__main__":
    main(options(__doc__ or "", parts=PARTS, data=True, data_for="deltas"))
