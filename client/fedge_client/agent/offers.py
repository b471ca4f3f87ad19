"""The digests of the tasks that a device offers, found without loading anything heavy into the agent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedge.errors import ConfigError
from fedge.task_digest import task_digest
from fedge_client.agent.settings import OfferedTask

_TIMEOUT_S = 120
# Finding a module runs the packages above it, which may load torch: in a process of its own.
_SCRIPT = """
import json, sys
from fedge.errors import ConfigError
from fedge.task_digest import task_digest
sys.path.append(sys.argv[1])
found = {}
for name in sys.argv[2:]:
    try:
        found[name] = [task_digest(name), ""]
    except ConfigError as error:
        found[name] = ["", str(error)]
print("\\n" + json.dumps(found))
"""


def digests_of(tasks: Sequence[OfferedTask], home: Path) -> dict[str, str]:
    """From each offered task's name to the digest of what it means on this device.

    Raises:
        ConfigError: a task cannot be found here, or its digest is not the pinned one.
    """
    own = [task.name for task in tasks if ":" in task.name]
    found = {task.name: task_digest(task.name) for task in tasks if ":" not in task.name}
    if own:
        found |= _in_a_process(own, home)
    for task in tasks:
        if task.pin and found[task.name] != task.pin:
            raise ConfigError(
                f"task {task.name!r}: its digest here is {found[task.name]}, but {task.pin} is pinned; "
                "its code has changed: restore it, or change the pin"
            )
    return found


def _in_a_process(names: list[str], home: Path) -> dict[str, str]:
    # A module of the device's own may lie in its folder; appended, it hides no installed one.
    command = [sys.executable, "-P", "-c", _SCRIPT, str(home.absolute()), *names]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=True)
        found: Mapping[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ConfigError(f"tasks: the digests of {names} cannot be found ({error})") from error
    for digest, fault in found.values():
        if not digest:
            raise ConfigError(fault)
    return {name: digest for name, (digest, _) in found.items()}
