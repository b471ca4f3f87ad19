"""Many clients on one machine: `fedge_simulations.run(config)` and the command `fedge-sim`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedge_simulations.simulate import Result, run

__all__ = ["Result", "run"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `fedge-sim --help` must not.
    if name not in __all__:
        raise AttributeError(f"module 'fedge_simulations' has no attribute {name!r}")
    from fedge_simulations import simulate

    return getattr(simulate, name)
