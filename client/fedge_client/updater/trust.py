"""Which files a device may install, by The Update Framework (specification 1.0.34), over any transport.

The workflow is python-tuf's: root chain, timestamp, snapshot, targets, delegations. Ours are the trusted root
as bytes, the clock, durable writes, bounds, one delegator for each role name, and errors. Targets are only
looked up here: python-tuf's way to download them is not safe from a kill or a full disk (`installer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.ngclient import FetcherInterface, UpdaterConfig
from tuf.ngclient import Updater as Workflow

from fedge.delivery import MAX_ROOT_BYTES, MAX_SNAPSHOT_BYTES, MAX_TARGETS_BYTES, MAX_TIMESTAMP_BYTES
from fedge.errors import (
    AbsentError,
    DigestError,
    DowngradeError,
    ExpiredError,
    FedgeError,
    FetchError,
    ForbiddenError,
    FormatError,
    SignatureError,
    TrustError,
)
from fedge.files import sole_holder, write_atomically
from fedge_client.updater.keys import check_keys
from fedge_client.updater.streams import DEFAULT_PACE, Fetcher, Pace, whole

Clock = Callable[[], datetime]
"""The time now, with a time zone."""


def utc_now() -> datetime:
    """The system's clock."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class Limits:
    """What metadata may take at most: no server makes a device read or follow more."""

    root_bytes: int = MAX_ROOT_BYTES
    timestamp_bytes: int = MAX_TIMESTAMP_BYTES
    snapshot_bytes: int = MAX_SNAPSHOT_BYTES
    targets_bytes: int = MAX_TARGETS_BYTES  # of each targets role
    rotations: int = 256  # root versions followed in one poll
    delegations: int = 32  # roles visited in one lookup

    def __post_init__(self) -> None:
        """Refuse nonsense on construction."""
        for name, value in asdict(self).items():
            if value < 1:
                raise FormatError(f"limits: {name} is {value}; it must be 1 or more")

    def of(self, name: str) -> int:
        """The most bytes of a metadata file, by its name: `7.snapshot.json`."""
        role = name.removesuffix(".json").rpartition(".")[2]
        sizes = {"root": self.root_bytes, "timestamp": self.timestamp_bytes, "snapshot": self.snapshot_bytes}
        return sizes.get(role, self.targets_bytes)


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Target:
    """A file that verified metadata lists."""

    path: str  # its name in metadata
    file: str  # its name in the repository: with its digest where that keeps consistent snapshots
    length: int  # bytes
    sha256: str
    custom: Mapping[str, Any] = field(default_factory=dict)  # what its signers say of it: plain JSON values


class Trust:
    """What a device trusts: a root given as bytes, and a folder that remembers what was seen.

    The folder is the protection from old metadata: keep it, and let one process at a time use it.
    """

    def __init__(
        self,
        folder: Path,
        root: bytes,
        fetch: Fetcher,
        *,
        clock: Clock = utc_now,
        limits: Limits = DEFAULT_LIMITS,
        pace: Pace = DEFAULT_PACE,
    ) -> None:
        """Nothing is read, written or fetched yet.

        Args:
            folder: where verified metadata is kept; made when it is absent.
            root: root metadata that came with the device, of any version that the repository ever had.
            fetch: gets `timestamp.json`, `2.root.json` and their like.
            clock: the time that dates of expiry are compared with, asked once for each poll.
            limits: what metadata may take at most.
            pace: how slow a stream may be.
        """
        self._folder, self._root, self._clock = folder, root, clock
        self._limits, self._fetcher = limits, _Metadata(fetch, limits, pace)

    def refresh(self) -> Trusted:
        """Fetch and verify the repository's newest metadata; what was known before stays when that fails.

        Raises:
            ExpiredError: a role is past its date: nobody has renewed it, somebody holds newer ones back, or
                the clock of this device is wrong.
            DowngradeError: older than what this device has seen, or parts of two publications mixed.
            SignatureError: not signed by enough of the keys that its delegator names.
            TrustError: malformed, too long, or other bytes than were signed.
            FetchError: it cannot be fetched now.
            FedgeError: the disk refuses it, or another poll is under way.
        """
        now = self._clock()
        if now.tzinfo is None:
            raise FormatError(f"clock: gives {now.isoformat()} without a time zone; give one, such as UTC")
        guard = _Guard(self._folder, now)
        with guard:
            workflow = _Workflow(self._folder, self._root, self._fetcher, self._limits, now)
            guard.workflow = workflow
            workflow.refresh()
        return Trusted(workflow, guard)


class Trusted:
    """Metadata of one poll, all of one time and one publication."""

    def __init__(self, workflow: _Workflow, guard: _Guard) -> None:
        self._workflow, self._guard = workflow, guard

    def target(self, path: str) -> Target | None:
        """What the most trusted role that may speak of a path says of it; None: no role lists it.

        Raises:
            TrustError: a role on the way is refused; see `Trust.refresh`.
            FetchError: it cannot be fetched now.
            FedgeError: the disk refuses it.
        """
        with self._guard:
            found = self._workflow.get_targetinfo(path)
        return None if found is None else _target(found, self._workflow.keeps_snapshots)

    def versions(self) -> dict[str, int]:
        """Version of each role that has been verified in this poll."""
        return self._workflow.versions()


class _Guard:
    """One process at a time; what fails inside comes out as ours."""

    def __init__(self, folder: Path, now: datetime) -> None:
        self._folder, self._now = folder, now
        self._lock = ExitStack()
        self.workflow: _Workflow | None = None  # for the dates in messages

    def __enter__(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(sole_holder(self._folder / ".lock"))
            for path in (*self._folder.glob(".*.json.*"), *self._folder.glob("root_history/.*")):
                path.unlink(missing_ok=True)  # half-written by a process that was killed
        except BlockingIOError as error:
            raise FedgeError(
                f"{self._folder}: another process polls with this folder; try again later"
            ) from error
        except OSError as error:
            raise self._disk(error) from error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._lock.close()
        if isinstance(error, OSError):
            raise self._disk(error) from error
        if isinstance(error, exceptions.RepositoryError | exceptions.DownloadError):
            raise self._ours(error) from error
        if isinstance(error, ValueError | KeyError | TypeError):  # of what a role holds
            raise FormatError(f"metadata: malformed ({type(error).__name__}: {_short(error)})") from error

    def _disk(self, error: OSError) -> FedgeError:
        return FedgeError(
            f"{self._folder}: metadata cannot be kept ({error.strerror or error}); make room, "
            "what was installed goes on working"
        )

    def _ours(self, error: Exception) -> FedgeError:
        if isinstance(error, exceptions.ExpiredMetadataError):
            return self._expired(error)
        if isinstance(error, exceptions.DownloadLengthMismatchError):
            return FormatError(f"metadata: {_short(error)}; whoever serves it sends more than was signed")
        if isinstance(error, exceptions.DownloadError):
            cause = error.__cause__
            return cause if isinstance(cause, FedgeError) else FetchError(f"metadata: {_short(error)}")
        if isinstance(error, exceptions.BadVersionNumberError):
            return DowngradeError(
                f"metadata: {_short(error)}; it is older than what this device has seen, or mixed from two "
                "publications; fetch from another source"
            )
        if isinstance(error, exceptions.UnsignedMetadataError):
            return SignatureError(
                f"metadata: {_short(error)}; it is not signed by enough of the keys that are trusted for it"
            )
        if isinstance(error, exceptions.LengthOrHashMismatchError):
            return DigestError(f"metadata: {_short(error)}; it is not the file that was signed")
        why = f" ({_short(error.__cause__)})" if isinstance(error.__cause__, Exception) else ""
        which = f"metadata: {self.workflow.asked}" if self.workflow else "the root that came with the device"
        return TrustError(f"{which}: {_short(error)}{why}; it is refused")

    def _expired(self, error: Exception) -> ExpiredError:
        dates = self.workflow.expiries(self._now) if self.workflow else {}
        said = "".join(f" ({role} on {when:%Y-%m-%d %H:%M} UTC)" for role, when in dates.items())
        return ExpiredError(
            f"metadata: {_short(error)}{said}, and this device's clock says {self._now:%Y-%m-%d %H:%M %Z}; "
            "set the clock if it is wrong, else wait for the publisher to renew it"
        )


class _Workflow(Workflow):
    """python-tuf's client workflow with a clock, durable writes and one delegator for each role name."""

    def __init__(
        self, folder: Path, root: bytes, fetcher: FetcherInterface, limits: Limits, now: datetime
    ) -> None:
        self._delegators: dict[str, str] = {}
        self._walked = False  # the chain of roots
        config = UpdaterConfig(
            max_root_rotations=limits.rotations,
            max_delegations=limits.delegations,
            root_max_length=limits.root_bytes,
            timestamp_max_length=limits.timestamp_bytes,
            snapshot_max_length=limits.snapshot_bytes,
            targets_max_length=limits.targets_bytes,
        )
        super().__init__(str(folder), _BASE, fetcher=fetcher, config=config, bootstrap=root)
        self._trusted_set.reference_time = now
        self.asked, self._given = "", b""  # the file that was fetched last

    @property
    def keeps_snapshots(self) -> bool:
        return bool(self._trusted_set.root.consistent_snapshot)

    def versions(self) -> dict[str, int]:
        return {role: self._trusted_set[role].version for role in self._trusted_set._trusted_set}

    def expiries(self, now: datetime) -> dict[str, datetime]:
        """Role and date of those that are past it."""
        known = self._trusted_set._trusted_set
        return {role: known[role].expires for role in known if known[role].is_expired(now)}

    def _load_targets(self, role: str, parent_role: str) -> Targets:
        """What one delegator's keys have signed must not be taken for what another's have."""
        if self._delegators.get(role, parent_role) != parent_role:
            raise exceptions.RepositoryError(
                f"role {role!r} is delegated by {self._delegators[role]!r} and by {parent_role!r}; "
                "a role name has one delegator"
            )
        targets = super()._load_targets(role, parent_role)
        if (found := targets.delegations) is not None:
            roles = [found.succinct_roles] if found.succinct_roles else (found.roles or {}).values()
            check_keys(role, roles, found.keys)
        self._delegators[role] = parent_role
        return targets

    def _download_metadata(self, rolename: str, length: int, version: int | None = None) -> bytes:
        self.asked = f"{rolename if version is None else f'{version}.{rolename}'}.json"
        self._given = super()._download_metadata(rolename, length, version)
        return self._given

    def _load_root(self) -> None:
        """To the newest root; a source that gives the trusted one once more has no newer one (5.3.5)."""
        self._walked = True
        self._forget_roots()
        try:
            super()._load_root()
        except exceptions.BadVersionNumberError:  # after its signatures were found to be those of the trusted
            if Metadata.from_bytes(self._given).signed.version != self._trusted_set.root.version:
                raise

    def _forget_roots(self) -> None:
        """Roots are kept once they are checked; one that was kept by less of a check is fetched again."""
        for path in Path(self._dir, "root_history").glob("*.root.json"):
            try:
                _check_root(Metadata[Root].from_bytes(path.read_bytes()).signed)
            except exceptions.RepositoryError:
                path.unlink()

    def _persist_root(self, version: int, data: bytes) -> None:
        """Keep a root that has just been verified, the one that came with the device too."""
        _check_root(self._trusted_set.root)
        super()._persist_root(version, data)

    def _persist_file(self, filename: str, data: bytes) -> None:
        """Survive a power cut; and with nothing new a full disk does not matter."""
        path = Path(filename)
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)

    def _update_root_symlink(self) -> None:
        """Replace the link as a whole, once the newest root is known: it may be lost, but not by us."""
        if not self._walked:  # else each poll would set it back to the device's first root, and forth again
            return
        link, version = Path(self._dir, "root.json"), self._trusted_set.root.version
        wanted = f"root_history/{version}.root.json"
        if not Path(self._dir, wanted).is_file():  # the last one could not be kept, or must not be
            wanted = f"root_history/{version - 1}.root.json"
        if link.is_symlink() and str(link.readlink()) == wanted:
            return
        new = link.with_name(".root.json.new")
        new.unlink(missing_ok=True)
        new.symlink_to(wanted)
        new.replace(link)


_BASE: Final = "repository:/"  # python-tuf asks for _BASE + name; our fetchers are given the name


_STATUS: Final[dict[type[FedgeError], int]] = {
    AbsentError: 404,
    ForbiddenError: 403,
}  # an outage is neither: it would freeze the root


class _Metadata(FetcherInterface):
    """Any fetcher of ours as one of python-tuf's, in memory: not through $TMPDIR, which may be full."""

    def __init__(self, fetch: Fetcher, limits: Limits, pace: Pace) -> None:
        self._ours, self._limits, self._pace = fetch, limits, pace

    def download_bytes(self, url: str, max_length: int) -> bytes:
        name = url.removeprefix(_BASE)
        maximum = min(max_length, self._limits.of(name))  # a length that is signed online is no bound
        try:
            return whole(self._ours, name, maximum, pace=self._pace)
        except FormatError as error:
            raise exceptions.DownloadLengthMismatchError(str(error)) from error
        except FedgeError as error:
            status = _STATUS.get(type(error))
            if status is not None:
                raise exceptions.DownloadHTTPError(str(error), status) from error
            raise exceptions.DownloadError(str(error)) from error

    def _fetch(self, url: str) -> Iterator[bytes]:
        raise exceptions.DownloadError(f"{url}: only metadata is fetched through python-tuf")


def _check_root(root: Root) -> None:
    check_keys(f"root version {root.version}", root.roles.values(), root.keys)


def _target(found: TargetFile, by_digest: bool) -> Target:
    digest = found.hashes.get("sha256")
    if digest is None or len(digest) != 64:
        raise FormatError(f"target {found.path!r}: its metadata has no SHA-256; sign it again with one")
    custom = found.unrecognized_fields.get("custom", {})
    if not isinstance(custom, dict):
        raise FormatError(f"target {found.path!r}: its custom field is no JSON object; sign it again")
    folder, slash, name = found.path.rpartition("/")
    file = f"{folder}{slash}{digest}.{name}" if by_digest else found.path
    return Target(found.path, file, found.length, digest, custom)


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
