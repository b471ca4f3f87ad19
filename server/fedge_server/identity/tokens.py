"""One-time tokens: made here, kept as a hash, shown once inside a join string."""

from __future__ import annotations

import re
import secrets
from typing import Final

from fedge.errors import UserError
from fedge.identity import JoinString
from fedge_server.identity.admission import secret_digest
from fedge_server.registry.devices import Devices

MAX_HOURS: Final = 24 * 365.0
_SECRET_BYTES: Final = 24  # 192 bits: nobody finds one by trying
_TIER = re.compile(r"[a-z][a-z0-9_-]{0,31}")


def new_join_string(
    devices: Devices, tier: str, *, host: str, port: int, pin: str, hours: float, now: float
) -> JoinString:
    """Let one device enrol, and say how.

    Args:
        devices: where the token is kept.
        tier: of the device.
        host: name or address that devices reach the server by.
        port: of the Enrolment service.
        pin: of the CA that has signed the server's certificate.
        hours: how long the token can be used.
        now: Unix seconds.

    Raises:
        UserError: the tier's name or the lifetime is impossible.
    """
    if not _TIER.fullmatch(tier):
        raise UserError(f"tier {tier!r}: a name has 1 to 32 lower-case letters, digits, '-' and '_'")
    if not 0 < hours <= MAX_HOURS:
        raise UserError(f"lifetime {hours:g} h: must be over 0 and at most {MAX_HOURS:g}")
    join = JoinString(host, port, secrets.token_hex(8), secrets.token_urlsafe(_SECRET_BYTES), pin)
    devices.create_token(
        token_id=join.token_id,
        secret_sha256=secret_digest(join.secret),
        tier=tier,
        expires=now + hours * 3600,
    )
    return join
