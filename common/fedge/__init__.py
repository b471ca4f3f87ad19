"""fedge: train one model on data that never leaves the devices, shrink it, put it safely on them.

This package is the vocabulary that server, client and simulations share. Importing it loads no torch
and no flwr; `fedge.learning` does.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from fedge.spec import Spec

if TYPE_CHECKING:
    from fedge.config import Config
    from fedge.dataset import Dataset, Examples
    from fedge.task import Source, Task

# OpenMP reads this when torch is loaded, so it must be set before any module of ours loads it. Threads that
# spin while they wait slow each other down as soon as the machine has other work: steps of McMahan's CNN were
# 5 to 7 times slower with spinning beside a busy process on two cores (benchmarks/threads.py). Whoever sets
# the variable himself is obeyed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = ["Config", "Dataset", "Examples", "Source", "Spec", "Task", "__version__"]

_HOME = {
    "Config": "fedge.config",
    "Dataset": "fedge.dataset",
    "Examples": "fedge.dataset",
    "Source": "fedge.task",
    "Task": "fedge.task",
}


def __getattr__(name: str) -> Any:
    # A device that only infers has numpy but not what the configuration needs (pydantic).
    import importlib

    if name not in _HOME:
        raise AttributeError(f"module 'fedge' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
