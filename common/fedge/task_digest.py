"""The digest of a task: server and device compare it before a device trains, so that both mean the same.

It needs no torch: an agent offers tasks without loading them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Final

from fedge.errors import ConfigError
from fedge.tasks import BUILT_IN

# Raised when the meaning of a built-in task changes: its models, its pre-processing, how it reads data. Not
# the source's own digest: a device one release older, with another comment in that file, must still work.
REVISIONS: Final = {"digits": 1, "images": 1, "tables": 1, "signals": 1, "characters": 1}


def task_digest(name: str) -> str:
    """64 hexadecimal digits that name what the task means.

    Of a built-in task: its name and revision. Of a `package.module:TASK`: the attribute's name and the
    module's source; where the module is a package, all its Python files. The module is found, not run
    (packages above it are).

    Raises:
        ConfigError: there is no such task or module, or its source cannot be read.
    """
    if ":" not in name:
        if name not in BUILT_IN:
            raise ConfigError(
                f"task = {name!r}: no built-in task ({', '.join(BUILT_IN)}); name yours package.module:TASK"
            )
        return hashlib.sha256(f"fedge:{name}:{REVISIONS[name]}".encode()).hexdigest()
    module, _, attribute = name.partition(":")
    sha = hashlib.sha256(attribute.encode())
    for path, shown in _sources(name, module):
        sha.update(b"\0" + shown.encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()


def _sources(name: str, module: str) -> list[tuple[Path, str]]:
    """The source files of a module, and what each is called in the digest."""
    if (here := str(Path.cwd())) not in sys.path:  # as fedge.task.resolve does
        sys.path.append(here)
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # a package above it may raise anything
        raise ConfigError(f"task = {name!r}: cannot be found ({type(error).__name__}: {error})") from error
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(f"task = {name!r}: there is no module {module!r} with a source file")
    origin = Path(spec.origin)
    if spec.submodule_search_locations is None:
        return [(origin, "")]
    return [
        (path, path.relative_to(origin.parent).as_posix()) for path in sorted(origin.parent.rglob("*.py"))
    ]
