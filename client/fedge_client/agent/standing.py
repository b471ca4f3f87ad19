"""What a device says when it asks for its version, and what an installation has come to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from fedge.delivery import role_of
from fedge.errors import FormatError
from fedge_client.delivery import Standing
from fedge_client.device import Device

_MAX_FAULT: Final = 1000  # characters: the whole is a short line


@dataclass(frozen=True, slots=True)
class Done:
    """What an installation has come to."""

    version: int  # that runs now; 0: none
    changed: bool = False  # whether it was installed now
    fault: str = ""  # why not, in one line
    passing: bool = False  # whether the fault is one of the moment: try again soon
    refused: str = ""  # where something was wrong with what came: the kind of error, such as SignatureError

    def to_line(self) -> bytes:
        """One line of JSON."""
        return json.dumps({**asdict(self), "fault": self.fault[:_MAX_FAULT]}).encode() + b"\n"

    @classmethod
    def from_line(cls, data: bytes) -> Done:
        """Read the line.

        Raises:
            FormatError: it is none.
        """
        try:
            value = json.loads(data)
            return cls(
                int(value["version"]),
                bool(value["changed"]),
                str(value["fault"]),
                bool(value["passing"]),
                str(value["refused"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(f"installation: ended without a result ({data[:80]!r})") from error


def standing(device: Device, *, told: int = 0, tags: Sequence[str] = ()) -> Standing:
    """What a device says when it asks which version is for it."""
    counted, known = device.store.state().counted, device.metadata()
    versions = {role: found.version for role, found in known.items()}
    return Standing(
        has=counted.version if counted else 0,  # of an earlier tier: nothing of this one
        told=told,
        tags=tuple(tags),
        root=versions.get("root", 0),
        tier_role=versions.get(role_of(device.tier), 0),
    )
