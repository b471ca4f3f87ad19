"""Devices that have enrolled, and the one-time tokens that let them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import sqlalchemy as sa

from fedge.errors import TrustError, UserError
from fedge_server.registry import schema
from fedge_server.registry.engine import reading, storable, writing

ACTIVE, REVOKED = "active", "revoked"
UNUSED_S: Final = 90 * 86_400.0  # that a token which nobody has used is listed after its end
_MAX_INTEGER: Final = 2**31 - 1  # of PostgreSQL's integer
_MAX_VERSION: Final = 64  # characters of a fedge version


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """A device as the database knows it; times are Unix seconds."""

    id: str  # SHA-256 of its public key
    node_id: int  # 63 bits, for Flower
    tier: str
    status: str  # active, revoked
    reason: str  # of the revocation
    public_key: str  # PEM
    sealing_key: str  # X25519, hexadecimal
    enrolled: float
    revoked: float | None
    last_seen: float | None
    certificate_not_after: float
    wire_version: int
    fedge_version: str
    bundle: str  # SHA-256 of the CA bundle it holds; empty: unknown


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A one-time token; its secret is known by its hash alone."""

    id: str
    secret_sha256: str
    tier: str
    created: float  # Unix seconds, as the others
    expires: float
    used_by: str | None  # device id
    used: float | None


class Devices:
    """Devices and tokens; every method is one transaction."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def enrol(
        self,
        *,
        device_id: str,
        node_id: int,
        public_key: str,
        sealing_key: str,
        tier: str,
        token_id: str,
        fedge_version: str,
        wire_version: int,
        not_after: float,
    ) -> DeviceRow:
        """Write a device down and use its token up; again with the same device and token is no error.

        Raises:
            TrustError: the token is unknown or used by another device, the device is revoked, or its node
                id belongs to another one.
        """
        now = time.time()
        values = {
            "tier": tier,
            "public_key": public_key,
            "sealing_key": sealing_key,
            "certificate_not_after": not_after,
            **_said(wire_version, fedge_version),
        }
        table = schema.devices
        with writing(self._engine) as connection:
            _use_token(connection, token_id, device_id, now)
            known = _device(connection, device_id)
            if known is not None and known.status == REVOKED:
                raise TrustError(f"device {device_id[:8]} is revoked; give it a new key to enrol it again")
            if known is not None:
                connection.execute(table.update().where(table.c.id == device_id).values(**values))
            else:
                other = connection.scalar(sa.select(table.c.id).where(table.c.node_id == node_id))
                if other is not None:
                    raise TrustError(f"device {device_id[:8]}: node id {node_id} belongs to {other[:8]}")
                connection.execute(
                    table.insert().values(
                        id=device_id,
                        node_id=node_id,
                        status=ACTIVE,
                        reason="",
                        enrolled=now,
                        bundle="",
                        **values,
                    )
                )
            return _required(connection, device_id)

    def get(self, device_id: str) -> DeviceRow | None:
        """The device of this id."""
        with reading(self._engine) as connection:
            return _device(connection, device_id)

    def all(self) -> list[DeviceRow]:
        """All devices, the revoked ones too, in the order of their enrolment."""
        query = _devices().order_by(schema.devices.c.enrolled, schema.devices.c.id)
        with reading(self._engine) as connection:
            return [DeviceRow(**row) for row in connection.execute(query).mappings()]

    def revoke(self, device_id: str, reason: str) -> DeviceRow:
        """Shut a device out from now on; a second time changes nothing.

        Raises:
            UserError: there is no such device.
        """
        table = schema.devices
        with writing(self._engine) as connection:
            changed = {"status": REVOKED, "reason": reason, "revoked": time.time()}
            still = (table.c.id == device_id) & (table.c.status == ACTIVE)
            connection.execute(table.update().where(still).values(**changed))
            return _required(connection, device_id)

    def renewed(self, device_id: str, not_after: float, bundle: str) -> None:
        """Remember a device's new certificate, and which CA bundle (SHA-256) it was given."""
        table = schema.devices
        changed = {"certificate_not_after": not_after, "bundle": bundle}
        with writing(self._engine) as connection:
            connection.execute(table.update().where(table.c.id == device_id).values(**changed))

    def seen(self, seen: Mapping[str, float]) -> None:
        """Remember when devices were last connected: Unix seconds by device id."""
        if not seen:
            return
        table = schema.devices
        update = table.update().where(table.c.id == sa.bindparam("device"))
        rows = [{"device": name, "at": moment} for name, moment in seen.items()]
        with writing(self._engine) as connection:
            connection.execute(update.values(last_seen=sa.bindparam("at")), rows)

    def introduced(self, device_id: str, *, wire_version: int, fedge_version: str, bundle: str) -> None:
        """Remember what a device said of itself when it connected; an empty bundle changes nothing."""
        table = schema.devices
        changed = _said(wire_version, fedge_version)
        if bundle:
            changed["bundle"] = bundle
        with writing(self._engine) as connection:
            connection.execute(table.update().where(table.c.id == device_id).values(**changed))

    def create_token(self, *, token_id: str, secret_sha256: str, tier: str, expires: float) -> None:
        """Let one device enrol until a moment in Unix seconds; tokens that ended unused long ago go."""
        values = {"id": token_id, "secret_sha256": secret_sha256, "tier": tier, "expires": expires}
        table, now = schema.tokens, time.time()
        with writing(self._engine) as connection:
            ended = table.c.used_by.is_(None) & (table.c.expires < now - UNUSED_S)
            connection.execute(table.delete().where(ended))
            connection.execute(table.insert().values(created=now, **values))

    def token(self, token_id: str) -> TokenRow | None:
        """The token of this id."""
        with reading(self._engine) as connection:
            return _token(connection, token_id)

    def tokens(self) -> list[TokenRow]:
        """All tokens, oldest first."""
        query = sa.select(schema.tokens).order_by(schema.tokens.c.created, schema.tokens.c.id)
        with reading(self._engine) as connection:
            return [TokenRow(**row) for row in connection.execute(query).mappings()]

    def delete_token(self, token_id: str) -> None:
        """Take a token back.

        Raises:
            UserError: there is no such token.
        """
        with writing(self._engine) as connection:
            gone = connection.execute(schema.tokens.delete().where(schema.tokens.c.id == token_id))
            if not gone.rowcount:
                raise UserError(f"token {token_id!r}: there is none; list them with: fedge-server token ls")


def _devices() -> sa.Select[Any]:
    return sa.select(*(schema.devices.c[field.name] for field in fields(DeviceRow)))


def _device(connection: sa.Connection, device_id: str) -> DeviceRow | None:
    row = connection.execute(_devices().where(schema.devices.c.id == device_id)).mappings().first()
    return DeviceRow(**row) if row else None


def _required(connection: sa.Connection, device_id: str) -> DeviceRow:
    device = _device(connection, device_id)
    if device is None:
        raise UserError(f"device {device_id!r}: there is none; list them with: fedge-server devices ls")
    return device


def _said(wire_version: int, fedge_version: str) -> dict[str, Any]:
    """What a device says of itself, as both databases can hold it: it must not make them refuse."""
    shown = "".join(letter for letter in fedge_version if letter.isprintable())
    return {"wire_version": min(wire_version, _MAX_INTEGER), "fedge_version": shown[:_MAX_VERSION]}


def _token(connection: sa.Connection, token_id: str) -> TokenRow | None:
    if not storable(token_id):
        return None
    row = connection.execute(sa.select(schema.tokens).where(schema.tokens.c.id == token_id)).mappings()
    found = row.first()
    return TokenRow(**found) if found else None


def _use_token(connection: sa.Connection, token_id: str, device_id: str, now: float) -> None:
    token = _token(connection, token_id)
    if token is None:
        raise TrustError(f"token {token_id!r}: there is none")
    if token.used_by not in (None, device_id):
        raise TrustError(f"token {token_id!r}: another device has used it; each token lets one device in")
    if token.used_by is None:
        table = schema.tokens
        connection.execute(table.update().where(table.c.id == token_id).values(used_by=device_id, used=now))
