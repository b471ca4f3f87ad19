"""Where a home keeps its repository, and which keys are at hand to sign for it.

    repository/          what devices read, see docs/repository.md
    keys/root.key        offline: carried away after init, needed again to change keys
    keys/targets.key     offline: needed to add tiers and to change their keys
    keys/snapshot.key    online, as is timestamp.key
    keys/tier-NAME.key   of a tier, where no signer process has it
    keys/content/        of sealed models, one for each version of each tier

A server's home has `server.toml` and gets its keys by `fedge-server init`. Any other home is the folder of a
simulation, which makes all keys itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from fedge.config import Tier
from fedge.delivery import role_of
from fedge.errors import FedgeError, SignerAwayError, UserError
from fedge.files import sole_holder, write_atomically
from fedge.sealing import room_within, sealed_bytes
from fedge_server.hub.home import Home
from fedge_server.hub.settings import Delivery, Inference, Rollouts, Settings
from fedge_server.repository import (
    ContentKeys,
    FileSigning,
    Lifetimes,
    Repository,
    RoleKeys,
    RoleStatus,
    Signing,
    TopRole,
    create_key,
    load_key,
    public_pem,
)
from fedge_server.repository.content_keys import FOLDER
from fedge_server.repository.keys import Passphrase
from fedge_server.signer.remote import RemoteSigning

REPOSITORY, KEYS = "repository", "keys"  # folders of a home
OFFLINE: Final[tuple[TopRole, ...]] = ("root", "targets")
ONLINE: Final[tuple[TopRole, ...]] = ("snapshot", "timestamp")


@dataclass(frozen=True, slots=True)
class AtHand:
    """The keys that can sign now."""

    top: dict[str, FileSigning]  # of root, targets, snapshot and timestamp, by role: key files of this home
    tiers: dict[str, list[Signing]]  # by tier: key files and signers
    away: tuple[str, ...] = ()  # why configured signers cannot be asked

    def of(self, *tiers: str) -> list[Signing]:
        """All keys of the four roles, and of these tiers."""
        return [*self.top.values(), *(key for tier in tiers for key in self.tiers.get(tier, ()))]


@dataclass(frozen=True, slots=True)
class ReleasePlace:
    """A home as whoever publishes sees it."""

    home: Path
    is_server: bool  # whether keys come from init alone
    delivery: Delivery = field(default_factory=Delivery)
    rollouts: Rollouts = field(default_factory=Rollouts)
    inference: Inference = field(default_factory=Inference)

    @classmethod
    def of(cls, home: Path) -> ReleasePlace:
        """The place of a home, with the settings of a server if it is one.

        Raises:
            ConfigError: its settings cannot be used.
        """
        settings = Home(home).settings
        if not settings.exists():
            return cls(home, is_server=False)
        loaded = Settings.load(settings)
        return cls(home, True, loaded.delivery, loaded.rollouts, loaded.inference)

    @property
    def keys(self) -> Path:
        """The folder of the keys."""
        return self.home / KEYS

    @property
    def repository(self) -> Repository:
        """The repository, which may not have been made yet."""
        lives = {
            role: timedelta(days=getattr(self.delivery, f"{role}_days"))
            for role in ("root", "targets", "tier", "snapshot", "timestamp")
        }
        return Repository(
            self.home / REPOSITORY,
            lifetimes=Lifetimes(**lives),
            keep=self.delivery.keep,
            content_keys=self.content_keys if self.seals else None,
        )

    @property
    def seals(self) -> bool:
        """Whether models are sealed; in a simulation no device is enrolled, so there is nobody to seal to."""
        return self.is_server and self.delivery.seal

    @property
    def content_keys(self) -> ContentKeys:
        """The keys of what is sealed, whether or not what comes next is."""
        return ContentKeys(self.keys / FOLDER)

    def travels(self, length: int) -> int:
        """How many bytes a variant of so many takes on the network."""
        return sealed_bytes(length) if self.seals else length

    def leaving_room(self, tiers: Mapping[str, Tier]) -> dict[str, Tier]:
        """Tiers whose budgets of bytes on the network leave room for what sealing adds."""
        return {
            name: tier
            if not self.seals or tier.max_wire_bytes is None
            else replace(tier, max_wire_bytes=max(1, room_within(tier.max_wire_bytes)))
            for name, tier in tiers.items()
        }

    def make(self, tiers: Iterable[str] = (), *, passphrase: Passphrase | None = None) -> None:
        """Make what is missing: keys, the repository, and tiers with keys of their own.

        Killed at any point, the same call goes on.

        Args:
            tiers: get a key here each.
            passphrase: of the keys of root and targets; None: they lie open for their owner.

        Raises:
            UserError: a key is there but cannot be used, such as an encrypted one without its passphrase.
        """
        with self._alone():
            top = {
                role: self._key(role, passphrase if role in OFFLINE else None)
                for role in (*OFFLINE, *ONLINE)
                if role not in OFFLINE or not self.repository.is_there or self._path(role).exists()
            }
            if not self.repository.is_there:
                self.repository.create({r: RoleKeys((k.key,)) for r, k in top.items()}, list(top.values()))
            known = self.tiers()
            for tier in tiers:
                if tier not in known:
                    key = self._key(role_of(tier), None)
                    self.repository.add_tier(tier, RoleKeys((key.key,)), [*top.values(), key])

    def tiers(self) -> dict[str, tuple[tuple[str, ...], int]]:
        """Ids of the keys of each tier that the repository has, and how many of them must sign."""
        if not self.repository.is_there:
            return {}
        return {
            role.role.removeprefix("tier-"): (role.keys, role.threshold)
            for role in self.repository.status()
            if role.role.startswith("tier-")
        }

    def elsewhere(self, tier: str, ids: Sequence[str]) -> str:
        """What to do about the keys of a tier that are not in this home, nor in a signer."""
        names = ", ".join(key[:8] for key in ids)
        return (
            f"keys already ({names}), which are not here; bring one to {self._path(role_of(tier))}, "
            f"name its signer in [delivery] signers, or replace it: fedge-server keys rotate tier-{tier}"
        )

    def is_ending(self, role: RoleStatus) -> bool:
        """Whether a role ends so soon that a person should look: online ones are signed again by the hub."""
        left = role.expires - datetime.now(UTC)
        return left < (timedelta(hours=12) if role.role in ONLINE else timedelta(days=14))

    def at_hand(self) -> AtHand:
        """The keys in this home that lie open, and the signers that answer."""
        top = self._open_keys((*OFFLINE, *ONLINE))
        tiers: dict[str, list[Signing]] = {}
        away = []
        for path in sorted(self.keys.glob("tier-*.key")):
            try:
                tiers.setdefault(path.stem.removeprefix("tier-"), []).append(load_key(path))
            except FedgeError as error:
                away.append(str(error))
        for socket in self.delivery.signers:
            try:
                signer = RemoteSigning(Path(socket), timeout_s=self.delivery.signer_timeout_s)
                tiers.setdefault(signer.tier, []).append(signer)
            except SignerAwayError as error:
                away.append(str(error))
        return AtHand(top, tiers, tuple(away))

    def online(self) -> list[FileSigning]:
        """The keys of snapshot and timestamp, as far as they are here."""
        return list(self._open_keys(ONLINE).values())

    def _open_keys(self, roles: Iterable[str]) -> dict[str, FileSigning]:
        found = {}
        for role in roles:
            with suppress(UserError):  # carried away, or encrypted: then it is not at hand
                found[role] = load_key(self._path(role))
        return found

    def _path(self, role: str) -> Path:
        return self.keys / f"{role}.key"

    def _key(self, role: str, passphrase: Passphrase | None) -> FileSigning:
        """A role's key; made if it is not there, with the public part beside it."""
        path = self._path(role)
        if path.exists():
            found = load_key(path, passphrase=passphrase)
        else:
            found = create_key(path, passphrase=passphrase)
        public = path.with_name(f"{path.name}.pub")
        if not public.exists():
            write_atomically(public, public_pem(found.key))
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time makes keys here."""
        self.keys.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with sole_holder(self.keys / "making.lock", patience_s=30.0):
                yield
        except BlockingIOError as error:
            raise FedgeError(f"{self.keys}: another process makes keys here; try again") from error
        except OSError as error:
            raise FedgeError(
                f"{self.keys}: keys cannot be made there ({error.strerror}); run this as its owner"
            ) from error
