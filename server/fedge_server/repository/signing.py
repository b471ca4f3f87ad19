"""The seam between a repository and the keys that sign it: what is to be signed, and by whom.

A key may lie in a file here (`keys.FileSigning`), in another process of its own user, or on another host: all
that a repository asks is a signature over given bytes, or a refusal with its reasons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from securesystemslib.exceptions import Error as SecureSystemsError
from securesystemslib.signer import Key, Signature
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Role, Root, Targets

from fedge.errors import (
    FedgeError,
    RefusedError,
    SignatureError,
    SignerAwayError,
    UnsignedError,
    UserError,
)

MAX_KEYS: Final = 16  # of one role; bounds the work of a device


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed model and what opens it: a signer that could not read it would sign blindly."""

    key: bytes = field(repr=False)  # the content key
    ciphertext: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why a release may be signed for a tier: what its signer checks again, as bytes."""

    manifest: bytes
    report: bytes  # of the gate
    golden: bytes  # the variant's answers to golden inputs
    reference: bytes = b""  # of its telemetry; empty: it has none
    sealed: Sealed | None = None  # None: its model is not sealed, or its key has been lost since


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be signed, with all that a signer of a tier needs to judge it."""

    role: str
    payload: bytes  # canonical JSON of the signed part: exactly the bytes to sign
    previous: bytes | None = None  # canonical JSON of what the role signed last; a signer may know better
    evidence: Mapping[int, Evidence] = field(default_factory=dict)  # of each version that a tier offers


class Signing(Protocol):
    """One key that signs, wherever it lies."""

    @property
    def key(self) -> Key:
        """The public part."""

    def sign(self, request: Request) -> Signature:
        """A signature over the payload.

        Raises:
            RefusedError: it will not sign this; the message lists the reasons.
            FedgeError: it cannot be reached, or failed.
        """


@dataclass(frozen=True, slots=True)
class RoleKeys:
    """The keys of a role, and how many of them must sign."""

    keys: tuple[Key, ...]
    threshold: int = 1

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        if not 1 <= len(self.keys) <= MAX_KEYS or len(set(self.ids)) != len(self.keys):
            raise UserError(
                f"keys of a role: {len(self.keys)}; there must be 1 to {MAX_KEYS}, each named once"
            )
        if type(self.threshold) is not int or not 1 <= self.threshold <= len(self.keys):
            raise UserError(
                f"threshold {self.threshold!r} of {len(self.keys)} keys: it must be from 1 to their number"
            )

    @property
    def ids(self) -> list[str]:
        """The names by which metadata refers to the keys."""
        return [key.keyid for key in self.keys]


def sign(
    metadata: Metadata[Any],
    request: Request,
    delegators: Sequence[Root | Targets],
    signing: Iterable[Signing],
) -> None:
    """Sign metadata so that each delegator accepts it; nothing is signed when a signer refuses.

    Args:
        metadata: whose signatures are replaced.
        request: what the signers are shown.
        delegators: who must accept it; two roots while the keys of a role change.
        signing: the keys at hand; those that are none of the role's are not asked.

    Raises:
        RefusedError: a signer will not.
        SignerAwayError: too few of the role's keys are at hand, since a signer could not be asked.
        UserError: too few of the role's keys are at hand.
        SignatureError: a signature is not one of its key.
    """
    wanted = {key: None for one in delegators for key in role_in(one, request.role).keyids}
    metadata.signatures.clear()
    away: SignerAwayError | None = None
    for signer in signing:
        if signer.key.keyid in wanted and signer.key.keyid not in metadata.signatures:
            try:
                metadata.signatures[signer.key.keyid] = _checked(signer, request)
            except SignerAwayError as error:
                away = error  # others of the role may be enough
    for one in delegators:
        found = one.get_verification_result(request.role, request.payload, metadata.signatures)
        if not found.verified and away is not None:
            raise away
        if not found.verified:
            names = ", ".join(key[:8] for key in found.unsigned) or "none"
            raise UserError(
                f"{request.role}: {len(found.signed)} of {found.threshold} signatures; "
                f"bring {found.missing} more of these keys: {names}"
            )


def role_in(delegator: Root | Targets, role: str) -> Role:
    """Keys and threshold of a role.

    Raises:
        UserError: there is none of that name.
    """
    try:
        return delegator.get_delegated_role(role)
    except ValueError as error:
        raise UserError(
            f"role {role[:60]!r} does not exist in this repository; list them with: fedge-server keys show"
        ) from error


def verify(metadata: Metadata[Any], role: str, delegators: Sequence[Root | Targets]) -> None:
    """Check that one of the delegators accepts what was read.

    Raises:
        SignatureError: none does.
    """
    for one in delegators:
        try:
            one.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except (UnsignedMetadataError, ValueError):
            continue
        return
    raise SignatureError(f"{role} version {metadata.signed.version}: not signed by enough keys of its role")


def _checked(signer: Signing, request: Request) -> Signature:
    try:
        signature = signer.sign(request)
    except UnsignedError as error:
        error.role = error.role or request.role
        raise
    except FedgeError:
        raise
    except Exception as error:  # a signer is another's code: whatever fails in it is no signature
        raise RefusedError(
            f"{request.role}: key {signer.key.keyid[:8]} did not sign ({error})", request.role
        ) from error
    try:
        if signature.keyid != signer.key.keyid:
            raise SignatureError(f"{request.role}: key {signer.key.keyid[:8]} signed in another's name")
        signer.key.verify_signature(signature, request.payload)
    except SecureSystemsError as error:
        raise SignatureError(
            f"{request.role}: what key {signer.key.keyid[:8]} returned is not its signature"
        ) from error
    return signature
