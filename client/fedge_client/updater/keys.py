"""One key counts once: two names or two spellings of it are no two keys (GHSA-3633-5h82-39pq)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Key, Role


def check_keys(delegator: str, roles: Iterable[Role], keys: Mapping[str, Key]) -> None:
    """Refuse roles that name one key twice.

    Args:
        delegator: whose metadata names them, for the message.
        roles: the roles; the same key in two of them is no matter.
        keys: the delegator's keys, by name.

    Raises:
        RepositoryError: two names in a role are of the same key.
    """
    for role in roles:
        held: dict[bytes, str] = {}
        for name in role.keyids:
            if (key := keys.get(name)) is None:
                continue
            first = held.setdefault(_itself(key), name)
            if first != name:
                raise RepositoryError(
                    f"{delegator}: names one key twice for a role, as {first[:8]} and as {name[:8]}"
                )


def _itself(key: Key) -> bytes:
    """What signatures are verified with, however it is written: digits in either case, text around a PEM.

    What cannot be loaded verifies nothing, and is compared as it is written.
    """
    public = str(key.to_dict()["keyval"].get("public"))
    try:
        if key.keytype == "ed25519":
            return bytes.fromhex(public)
        loaded = load_pem_public_key(public.encode())
        return loaded.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, UnsupportedAlgorithm):
        return "".join(public.split()).encode(errors="surrogatepass")
