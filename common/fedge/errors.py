"""Every error that fedge raises on purpose, in one tree.

FedgeError                  the work failed                        exit code 1
├── UserError               the user can mend it                   exit code 2
│   ├── ConfigError         a key or value of the configuration
│   └── DataError           a data file, its arrays or its values
├── RoundError              a federated round could not be completed
│   ├── SupersededError     another worker has taken over the run
│   ├── HubAwayError        the hub has been away for too long
│   └── BudgetError         the privacy budget does not reach for another round
├── CompressionError        a stage could not produce a variant
├── UnsignedError           a role was not signed, and nothing was published
│   ├── RefusedError        a signer would not sign what it was shown
│   └── SignerAwayError     it could not be asked, or gave no answer
├── FetchError              something could not be fetched now; it may be later
│   ├── AbsentError         the source says that it has no such file
│   ├── ForbiddenError      the source says that this device may not have it
│   └── SlowError           it came more slowly than is waited for
├── BusyError               too much is asked at once; later it may be answered
├── LateError               the deadline of a request has passed
└── TrustError              something from outside was refused
    ├── FormatError         malformed, truncated or larger than it may be
    ├── SignatureError      not signed by a trusted key
    ├── DigestError         the bytes are not the ones that were signed
    ├── SealError           what was sealed does not open here: another key, or changed
    ├── IdentityError       a certificate, token or pin does not say who it must
    │   └── RevokedError    it did, until its device was revoked
    ├── UnlistedError       metadata says nothing of a tier
    ├── DowngradeError      older than what the device may run
    ├── ExpiredError        metadata past its date, by the clock of this device
    └── HealthError         a model that did not pass its trial on this device

Foreign exceptions are wrapped where they enter. A message says what was wrong, with which value, and
what to do about it, in one line.
"""

from __future__ import annotations


class FedgeError(Exception):
    """The work failed; the message says why."""

    exit_code = 1


class UserError(FedgeError):
    """The user can mend this: one clear line, no traceback."""

    exit_code = 2


class ConfigError(UserError):
    """A key or a value of the configuration is wrong."""


class DataError(UserError):
    """A data file is missing, malformed or holds values that cannot be used."""


class RoundError(FedgeError):
    """A federated round could not be completed."""


class SupersededError(RoundError):
    """Another worker has taken over the run; this one stops and changes nothing."""


class HubAwayError(RoundError):
    """The hub has been away for too long; the run goes on when it is back."""


class BudgetError(RoundError):
    """The privacy budget does not reach for another round; the model of the last one stays."""


class CompressionError(FedgeError):
    """A compression stage could not produce a variant."""


class TimeUpError(CompressionError):
    """A stage has not ended by its deadline; with more time it may."""


class FetchError(FedgeError):
    """Something could not be fetched, or came too slowly; what was installed goes on working."""


class AbsentError(FetchError):
    """The source says that it has no such file."""


class ForbiddenError(FetchError):
    """The source says that this device may not have the file."""


class SlowError(FetchError):
    """It came more slowly than is waited for; what has come is kept."""


class BusyError(FedgeError):
    """More is asked at once than is served; later it may be answered."""


class LateError(FedgeError):
    """The deadline of a request has passed before it was answered."""


class UnsignedError(FedgeError):
    """A role was not signed; nothing was published."""

    def __init__(self, message: str, role: str = "") -> None:
        super().__init__(message)
        self.role = role  # whose metadata it was; empty: not known


class RefusedError(UnsignedError):
    """A signer would not sign what it was shown; the message lists its reasons."""


class SignerAwayError(UnsignedError):
    """A signer could not be asked, or gave no answer; it may later."""


class TrustError(FedgeError):
    """Something that came from outside was refused."""


class FormatError(TrustError):
    """Malformed, truncated, or larger than its stated maximum."""


class SignatureError(TrustError):
    """Not signed by a key that is trusted here."""


class DigestError(TrustError):
    """The bytes are not the bytes that were signed."""


class SealError(TrustError):
    """What was sealed does not open: with another key, for another tier, version or device, or changed."""


class IdentityError(TrustError):
    """A certificate, a token or a pin does not say who it must; `kind` names the cause in one word."""

    def __init__(self, message: str, kind: str = "other") -> None:
        super().__init__(message)
        self.kind = kind  # one of a few: metrics count by it


class RevokedError(IdentityError):
    """The device was enrolled and has been revoked."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "revoked")


class UnlistedError(TrustError):
    """Metadata says nothing of a tier: as before its first release, or as if it had been left out."""


class DowngradeError(TrustError):
    """Older than what this device may run."""


class ExpiredError(TrustError):
    """Metadata is past its date, by the clock of this device."""


class HealthError(TrustError):
    """A model did not pass its trial on this device, or is one that did not."""
