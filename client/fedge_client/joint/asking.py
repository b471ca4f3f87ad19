"""`[joint]` of `agent.toml` and an enrolled device's identity become somebody to ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from fedge.errors import FedgeError, FormatError
from fedge.routing import CLOUD_ONLY, DEVICE_ONLY, Rule, Wanted
from fedge_client.agent.identity import BUNDLE, CERTIFICATE, FOLDER, HUB, Identity
from fedge_client.agent.settings import AskingSettings
from fedge_client.joint.budget import Budget
from fedge_client.joint.cloud import GrpcCloud
from fedge_client.joint.joint import CloudError, Joint, JointSettings, log
from fedge_client.runtime import Runtime
from fedge_client.serving.holder import Holder

_RENEWED: Final = (CERTIFICATE, BUNDLE, HUB)  # files of an identity that the agent replaces


class Renewed:
    """The identity of a home as it is now: the agent renews it while others run.

    Args:
        home: of the device.

    Raises:
        UserError: it is not enrolled, or others may read its keys.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._seen = self._mark()
        self._identity: Identity | None = None
        try:
            self._identity = Identity.open(home)
        except FormatError as error:  # the device answers alone, until that is mended
            log.warning("joint: the cloud is not asked: %s", error)

    def __call__(self) -> Identity:
        """Costs three looks at the disk; what cannot be read now leaves the one that was read before.

        Raises:
            CloudError: there is none.
        """
        mark = self._mark()
        if mark != self._seen:
            try:
                self._identity, self._seen = Identity.open(self._home), mark
            except FedgeError as error:  # looked at again at the next call
                log.info("joint: the identity cannot be read now: %s", error)
        if self._identity is None:
            raise CloudError("refused", "this device's identity is damaged")
        return self._identity

    def _mark(self) -> tuple[object, ...]:
        found: list[object] = []
        for name in _RENEWED:
            try:
                stat = (self._home / FOLDER / name).stat()
            except OSError:
                continue
            found.append((name, stat.st_ino, stat.st_mtime_ns))
        return tuple(found)


def joint_settings(asking: AskingSettings) -> JointSettings:
    """What `[joint]` means.

    Raises:
        UserError: values that do not fit together.
    """
    rule: dict[str, Rule | None] = {"release": None, "device-only": DEVICE_ONLY, "cloud-only": CLOUD_ONLY}
    if asking.threshold is not None:
        rule[asking.rule] = Rule(asking.rule, asking.threshold)
    return JointSettings(
        rule=rule[asking.rule],
        wanted=Wanted(asking.share, asking.accuracy),
        private=asking.private,
        deadline_s=asking.deadline_s,
        reserve_s=min(JointSettings().reserve_s, asking.deadline_s / 4),
        budget=Budget(asking.per_hour, asking.burst),
    )


@asynccontextmanager
async def asking_of(
    home: Path, asking: AskingSettings, holder: Holder[Runtime] | None = None
) -> AsyncIterator[Joint]:
    """Device and cloud together, for as long as the block lasts. In privacy mode there is no connection.

    Args:
        home: of the device.
        asking: what its file says; whether that is enabled, the caller decides.
        holder: the installed variant; None: only what was answered elsewhere is completed.

    Raises:
        UserError: the device is not enrolled, or the settings do not fit together.
    """
    settings = joint_settings(asking)
    cloud = None if asking.private else GrpcCloud(Renewed(home))
    joint = Joint(holder or Holder(), cloud, settings)
    try:
        yield joint
    finally:
        await joint.close()
        if cloud is not None:
            await cloud.close()
