"""The apps on Flower's own SuperLink: real processes, TLS, registered SuperNodes, each with its own file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedge_server.registry.database import Registry

APP = Path(__file__).parents[2] / "server" / "superlink"

pytestmark = pytest.mark.slow


def test_two_rounds_with_two_authenticated_supernodes_end_with_a_committed_model(side, tls, shares, tmp_path):
    north, south, server = shares
    config = tmp_path / "run.toml"
    settings = '[model]\nname = "mlp"\n[rounds]\ncount = 2\ndeadline_s = 120\n'
    config.write_text(f'task = "images"\ndata = "{server}"\n{settings}')
    nodes = [f'task="images" data="{path}"' for path in (north, south)]
    home = tmp_path / "home"
    with side.deployment(tmp_path / "sl", APP, nodes, tls, {"FEDGE_HOME": str(home)}) as made:
        stranger = made.process("stranger", stranger_command(side, made, tmp_path))
        run = made.start({"fedge-config": str(config), "fedge-run": "mine"})
        assert made.wait(run, 240) == "finished:completed", made.superlink.text()[-3000:]
        assert "SuperNode ID" not in stranger.text()
        assert made.online() == 2
    with Registry.open(home) as registry:
        (row,) = registry.runs()
        last = registry.last_round("mine")
    assert (row["id"], row["status"]) == ("mine", "done")
    assert last is not None
    assert (last.record.round, last.record.clients, last.record.rejected) == (2, 2, ())
    assert last.record.metrics["accuracy"] > 0.7
    assert side.processes_of(tmp_path / "sl") == []


def test_clients_that_remember_or_work_on_by_themselves_do_so_on_a_superlink(side, shares, tmp_path):
    north, south, server = shares
    home, options = tmp_path / "home", {"ditto": "", "fedbuff": ", buffer = 2"}
    nodes = [f'task="images" data="{path}"' for path in (north, south)]
    with side.deployment(tmp_path / "sl", APP, nodes, None, {"FEDGE_HOME": str(home)}) as made:
        for name, further in options.items():
            config = tmp_path / f"{name}.toml"
            config.write_text(f'''
                task = "images"
                data = "{server}"
                model = {{ name = "mlp", standardise = false }}
                rounds = {{ count = 2, deadline_s = 60 }}
                strategy = {{ name = "{name}"{further} }}
                train = {{ momentum = 0.0, learning_rate = 0.1 }}
            ''')
            run = made.start({"fedge-config": str(config), "fedge-run": name})
            assert made.wait(run, 200) == "finished:completed", made.superlink.text()[-3000:]
    for name in options:
        with Registry.open(home) as registry:
            first, *rounds = registry.records(name)
        assert [(r.clients, r.rejected, r.counted) for r in rounds] == [(2, (), True)] * 2, name
        assert rounds[-1].metrics["loss"] < first.metrics["loss"], name


def stranger_command(side, made, folder: Path) -> list[object]:
    """A SuperNode with a key of its own that nobody registered."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (folder / "stranger.key").write_bytes(key)
    return [
        *(side.BIN / "flower-supernode", "--superlink", f"127.0.0.1:{made.port}"),
        *("--port", side.free_port(), "--root-certificates", made.tls.ca),
        *("--auth-supernode-private-key", folder / "stranger.key"),
    ]
