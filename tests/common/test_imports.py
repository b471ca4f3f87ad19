"""One-way arrows: fedge <- server, fedge <- client, all three <- simulations; and what an import costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "fedge": "common",
    "fedge_server": "server",
    "fedge_client": "client",
    "fedge_simulations": "simulations",
}
MAY_IMPORT = {
    "fedge": {"fedge"},
    "fedge_server": {"fedge", "fedge_server"},
    "fedge_client": {"fedge", "fedge_client"},
    "fedge_simulations": set(FOLDERS),
}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and first part of every module that is imported, also inside functions and by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.partition(".")[0]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            first, dot, _ = node.value.partition(".")
            if dot and " " not in node.value and "/" not in node.value:  # as importlib would take it
                yield node.lineno, first


def upward(source: str, package: str) -> list[str]:
    tree = ast.parse(source)
    return [
        f"line {line}: {name}" for line, name in imported(tree) if name in set(FOLDERS) - MAY_IMPORT[package]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("package", FOLDERS)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    files = sorted((ROOT / FOLDERS[package] / package).rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): upward(file.read_text("utf-8"), package) for file in files}
    assert {name: lines for name, lines in wrong.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import fedge_server",
        "import os, fedge_server.rounds as r",
        "from fedge_server.rounds import loop",
        "def f():\n    from fedge_server import app",
        "import importlib\nimportlib.import_module('fedge_server.app')",
    ],
)
def test_the_walk_sees_an_arrow_that_points_up(source: str) -> None:
    assert upward(source, "fedge")
    assert upward(source, "fedge_client")
    assert not upward(source, "fedge_server")


# What may not be loaded after an import; those that may load more come later.
LIGHT = {
    "import fedge": {"torch", "flwr", "pydantic", "sklearn", "pyarrow"},
    "import fedge; fedge.Spec; fedge.__version__": {"torch", "flwr", "pydantic"},
    "import fedge.cli, fedge_simulations": {"torch", "flwr", "pydantic"},
    "import fedge_client.cli, fedge_server.cli, fedge_simulations.cli": {  # what --help waits for
        *("torch", "flwr", "onnx", "onnxruntime", "sklearn", "pydantic", "sqlalchemy", "alembic"),
        *("cryptography", "grpc", "tuf", "PIL", "rich", "matplotlib"),
    },
    "import fedge.artefact": {"torch", "flwr", "onnx", "onnxruntime", "sklearn", "pydantic"},
    "import fedge_client.agent.running, fedge_client.cli": {
        *("torch", "flwr", "onnxruntime", "sklearn", "pydantic", "PIL"),
    },
    "import fedge_client.agent.enrolment, fedge_client.agent.diagnosis": {
        *("torch", "flwr", "sklearn", "pydantic", "onnxruntime"),
    },
    "import fedge_client.telemetry.collector, fedge_client.telemetry.sending, fedge_client.memory.memory": {
        *("torch", "flwr", "onnxruntime", "sklearn", "pydantic", "PIL"),
    },
    "import fedge_client.updater": {"torch", "flwr", "sklearn", "pydantic"},
    "import fedge_client.runtime": {"torch", "flwr", "sklearn", "pydantic"},
    "import fedge_client.serving.running, fedge_client.serving.rpc, fedge_client.joint.cloud": {
        *("torch", "flwr", "sklearn", "pydantic", "PIL"),
    },
    "import fedge_server.registry.database, fedge_server.registry.queue": {
        *("torch", "flwr", "alembic", "pydantic"),
    },
    "from fedge import Config, Task, Source, Dataset, Examples": {"torch", "flwr", "sklearn", "pyarrow"},
    "import fedge_server.inference.service, fedge_server.inference.exports": {
        "torch",
        "flwr",
        "sklearn",
        "onnx",
    },
    "import fedge_server.hub.server, fedge_server.hub.preflight": {"torch", "flwr", "sklearn", "onnx"},
    "import fedge_server.hub.enrolment, fedge_server.cli.fleet": {"torch", "flwr", "sklearn"},
}


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """By import, what of the heavy was there after it: one process does them all, one after the other.

    What is absent after all of them so far would be so after each alone.
    """
    path = [str(ROOT / folder) for folder in FOLDERS.values()]
    script = f"""
import json, sys
sys.path[:0] = {path!r}
found = {{}}
for code, absent in {LIGHT!r}.items():
    exec(code)
    found[code] = sorted(absent & set(sys.modules))
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("code", LIGHT)
def test_an_import_loads_nothing_heavy(code: str, loaded: dict[str, list[str]]) -> None:
    assert loaded[code] == []


def test_a_name_that_fedge_does_not_have_is_an_attribute_error() -> None:
    import fedge

    with pytest.raises(AttributeError, match="no attribute 'Tsak'"):
        fedge.Tsak  # noqa: B018 - the access is the test
    assert all(getattr(fedge, name) is not None for name in fedge.__all__)
