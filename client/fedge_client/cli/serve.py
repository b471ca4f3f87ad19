"""`fedge-client serve`: the installed model for other programs of this device."""

from __future__ import annotations

import argparse
from typing import Any

from fedge import cli, logs
from fedge_client.cli.agent import add_home


def add(commands: Any) -> None:
    """Add the subcommand."""
    made = cli.subcommand(
        commands,
        "serve",
        _serve,
        summary="Let other programs of this device ask the installed model, over HTTP and gRPC.",
        examples="  fedge-client serve\n  fedge-client serve --http 127.0.0.1:8080 --grpc off\n"
        "  curl --unix-socket ~/.fedge/serving/http.sock -H 'Content-Type: image/png' "
        "--data-binary @picture.png http://localhost/v1/infer",
    )
    add_home(made)
    where = "unix:PATH, 127.0.0.1:PORT or off"
    made.add_argument("--http", metavar="ADDRESS", help=f"{where} (default: unix:HOME/serving/http.sock)")
    made.add_argument("--grpc", metavar="ADDRESS", help=f"{where} (default: unix:HOME/serving/grpc.sock)")
    logs.add_option(made)
    made.add_argument("--threads", type=int, default=1, help="of onnxruntime, for one example (default: 1)")
    made.add_argument(
        "--workers", type=int, default=1, help="requests that are answered at a time (default: 1)"
    )
    made.add_argument("--queue", type=int, default=64, help="requests that wait for that (default: 64)")
    made.add_argument("--max-bytes", type=int, default=4 * 1024**2, help="of one request (default: 4194304)")
    made.add_argument("--deadline-ms", type=float, default=5000.0, help="of one request (default: 5000)")


def _serve(arguments: argparse.Namespace) -> int:
    from fedge.errors import UserError
    from fedge_client import said
    from fedge_client.agent import settings
    from fedge_client.agent.status import notify
    from fedge_client.serving import running
    from fedge_client.serving.limits import Limits

    if arguments.threads < 1:
        raise UserError(f"--threads {arguments.threads}: must be 1 or more")
    folder = arguments.home.absolute() / running.FOLDER
    found = {}
    for name, default in (("http", running.HTTP), ("grpc", running.GRPC)):
        text = getattr(arguments, name) or f"unix:{folder / default}"
        found[name] = None if text == "off" else running.Address.parse(text)
    limits = Limits(
        request_bytes=arguments.max_bytes,
        bodies_bytes=8 * arguments.max_bytes,
        workers=arguments.workers,
        queue=arguments.queue,
        deadline_s=arguments.deadline_ms / 1000,
    )
    own = settings.load(arguments.home / settings.FILE)
    telemetry = own.telemetry.collecting()
    said.start(arguments.log_format, running.log)
    return running.serve(
        arguments.home,
        http=found["http"],
        grpc=found["grpc"],
        limits=limits,
        threads=arguments.threads,
        telemetry=telemetry,
        asking=own.joint,
        ready=lambda _: notify("READY=1"),
    )
