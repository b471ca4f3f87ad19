"""The device answers when it is sure, and asks the cloud when it is not and may; in time in any case.

`budget` and `breaker` are rules over values, `joint` carries them out, `cloud` is the connection; which
answers are doubted is `fedge.routing`.
"""

from __future__ import annotations

from fedge_client.joint.breaker import Breaker, BreakerSettings
from fedge_client.joint.budget import Bucket, Budget, take
from fedge_client.joint.joint import Answer, Cloud, CloudAnswer, CloudError, Joint, JointSettings

__all__ = [
    "Answer",
    "Breaker",
    "BreakerSettings",
    "Bucket",
    "Budget",
    "Cloud",
    "CloudAnswer",
    "CloudError",
    "Joint",
    "JointSettings",
    "take",
]
