"""nginx before a SuperLink, with the configuration files as they are shipped: what gets through, what not."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

APP = Path(__file__).parents[2] / "server" / "superlink"
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt install nginx-light)"),
]

MAIN = """\
daemon off;
pid {folder}/nginx.pid;
error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""


@contextmanager
def nginx(side, name: str, port: int, replace: dict[str, str], folder: Path) -> Iterator[None]:
    """Run nginx with a shipped file, after putting this machine's ports and folders into it."""
    folder.mkdir()
    text = (APP / name).read_text("utf-8")
    for old, new in replace.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "site.conf").write_text(text, "utf-8")
    user = "user root;\n" if os.geteuid() == 0 else ""  # else its workers could not read the folder
    (folder / "nginx.conf").write_text(user + MAIN.format(folder=folder), "utf-8")
    log = folder / "nginx.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")], stdout=file, stderr=file
        )
    try:
        side.until(f"nginx listens ({log})", lambda: listens(port) or ended(process, log))
        yield
    finally:
        process.terminate()
        process.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ended(process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    return False


class Caller:
    """Sends requests to the server's nginx with the certificate and key of these files, or with none."""

    def __init__(self, port: int, ca: Path, certificate: Path | None = None, key: Path | None = None) -> None:
        self.port, self.context = port, ssl.create_default_context(cafile=str(ca))
        if certificate is not None:
            self.context.load_cert_chain(certificate, key)

    def send(self, path: str, method: str = "POST", body: bytes = b"") -> tuple[int, str]:
        """Status and body of a path that is sent as it is, without any cleaning."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=self.context, timeout=20)
        try:
            connection.request(method, path, body=body, headers={"Content-Type": "application/protobuf"})
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        finally:
            connection.close()


@pytest.fixture(scope="module")
def proxied(side, tls, certificates, tmp_path_factory):
    """A SuperLink, the port of the nginx before it, and that of the nginx of a device."""
    folder = tmp_path_factory.mktemp("nginx")
    front, near = side.free_port(), side.free_port()
    server, device, shut_out = certificates.server, *certificates.devices
    serial = subprocess.run(
        ["openssl", "x509", "-noout", "-serial", "-in", shut_out / "device.pem"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.partition("=")[2]
    with side.deployment(folder / "sl", APP, (), tls) as made:
        at_server = {
            "127.0.0.1:8000": f"127.0.0.1:{made.port}",
            "listen 9443": f"listen 127.0.0.1:{front}",
            "/etc/fedge/superlink": str(server),
            "# 0A1B2C3D4E5F 1;": f"{serial.strip()} 1;",
        }
        on_device = {
            "server fedge.example.org:9443": f"server 127.0.0.1:{front}",
            "listen 127.0.0.1:9443": f"listen 127.0.0.1:{near}",
            "/etc/fedge/device": str(device),
        }
        with (
            nginx(side, "nginx.conf", front, at_server, folder / "front"),
            nginx(side, "nginx-device.conf", near, on_device, folder / "near"),
        ):
            yield made, front, near


@pytest.fixture
def device(proxied, certificates) -> Caller:
    folder = certificates.devices[0]
    return Caller(proxied[1], folder / "ca.pem", folder / "device.pem", folder / "device.key")


def test_a_supernode_connects_through_both_proxies(side, proxied, certificates):
    made, _, near = proxied
    node = made.add_node(port=near, ca=certificates.devices[0] / "local.pem")
    side.until("it connects", lambda: node.said("SuperNode ID"))
    assert made.online() == 1


def test_a_device_reaches_the_fleet_api_and_without_a_key_no_further(device):
    status, body = device.send("/v1/fleet/pull-messages")
    assert status == 401, body
    assert "Invalid SuperNode authentication" in body


def test_a_piece_of_an_array_is_not_too_large(device):
    piece = b"\x0a" + bytes([0x80, 0x80, 0xC0, 0x02]) + bytes(5 * 2**20)  # field 1: 5 MiB
    status, body = device.send("/v1/fleet/push-object", body=piece)
    assert status not in (413, 502), body
    assert "nginx" not in body


@pytest.mark.parametrize("who", ["nobody", "a stranger", "the server"])
def test_who_shows_no_certificate_of_a_device_reaches_nothing(who, proxied, certificates):
    server, ca = certificates.server, certificates.server / "ca.pem"
    shown = {
        "nobody": (),
        "a stranger": (certificates.devices[0] / "local.pem", certificates.devices[0] / "local.key"),
        "the server": (
            server / "server.pem",
            server / "server.key",
        ),  # of the same authority, not for clients
    }[who]
    status, body = Caller(proxied[1], ca, *shown).send("/v1/fleet/pull-messages")
    assert status == 400
    assert re.search("No required SSL certificate|SSL certificate error", body)


def test_a_device_whose_serial_number_is_in_the_map_is_shut_out(proxied, certificates):
    folder = certificates.devices[1]
    caller = Caller(proxied[1], folder / "ca.pem", folder / "device.pem", folder / "device.key")
    assert caller.send("/v1/fleet/pull-messages")[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/v1/runtime/responses",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol%2flist-runs",
        "/v1/fleet//../control/list-runs",
        "/v1/control/list-runs/../../fleet/pull-messages",
        "/v1/control/list-runs%3f/../../fleet/pull-messages",
        "//v1/fleet/pull-messages",
        "/v1/fleet/pull-messages?/v1/control/list-runs",
    ],
)
def test_a_device_reaches_no_other_path(path, device, proxied):
    status, body = device.send(path)
    assert status == 404
    assert "<center>nginx" in body  # it is not the SuperLink that has no such path
    assert "list-runs" not in proxied[0].superlink.text()


def test_the_path_that_is_refused_there_asks_for_nothing_on_loopback(proxied, certificates):
    status, body = Caller(proxied[0].port, certificates.server / "ca.pem").send("/v1/control/list-nodes")
    assert status == 200, body


def test_only_posts_are_passed_on(device):
    assert device.send("/v1/fleet/pull-messages", "GET")[0] == 403
