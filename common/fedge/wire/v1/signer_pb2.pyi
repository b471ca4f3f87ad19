from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SignerRequest(_message.Message):
    __slots__ = ("describe", "sign")
    DESCRIBE_FIELD_NUMBER: _ClassVar[int]
    SIGN_FIELD_NUMBER: _ClassVar[int]
    describe: DescribeSigner
    sign: SignRole
    def __init__(self, describe: _Optional[_Union[DescribeSigner, _Mapping]] = ..., sign: _Optional[_Union[SignRole, _Mapping]] = ...) -> None: ...

class DescribeSigner(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SignRole(_message.Message):
    __slots__ = ("role", "payload", "previous", "evidence")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    role: str
    payload: bytes
    previous: bytes
    evidence: _containers.RepeatedCompositeFieldContainer[ReleaseEvidence]
    def __init__(self, role: _Optional[str] = ..., payload: _Optional[bytes] = ..., previous: _Optional[bytes] = ..., evidence: _Optional[_Iterable[_Union[ReleaseEvidence, _Mapping]]] = ...) -> None: ...

class ReleaseEvidence(_message.Message):
    __slots__ = ("version", "manifest", "report", "golden", "sealed", "reference")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    GOLDEN_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    version: int
    manifest: bytes
    report: bytes
    golden: bytes
    sealed: SealedModel
    reference: bytes
    def __init__(self, version: _Optional[int] = ..., manifest: _Optional[bytes] = ..., report: _Optional[bytes] = ..., golden: _Optional[bytes] = ..., sealed: _Optional[_Union[SealedModel, _Mapping]] = ..., reference: _Optional[bytes] = ...) -> None: ...

class SealedModel(_message.Message):
    __slots__ = ("key", "ciphertext")
    KEY_FIELD_NUMBER: _ClassVar[int]
    CIPHERTEXT_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    ciphertext: bytes
    def __init__(self, key: _Optional[bytes] = ..., ciphertext: _Optional[bytes] = ...) -> None: ...

class SignerReply(_message.Message):
    __slots__ = ("description", "signed", "refusal", "failure")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SIGNED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    description: SignerDescription
    signed: SignedRole
    refusal: SignRefusal
    failure: str
    def __init__(self, description: _Optional[_Union[SignerDescription, _Mapping]] = ..., signed: _Optional[_Union[SignedRole, _Mapping]] = ..., refusal: _Optional[_Union[SignRefusal, _Mapping]] = ..., failure: _Optional[str] = ...) -> None: ...

class SignerDescription(_message.Message):
    __slots__ = ("tier", "public_key", "version")
    TIER_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    tier: str
    public_key: str
    version: int
    def __init__(self, tier: _Optional[str] = ..., public_key: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class SignedRole(_message.Message):
    __slots__ = ("key_id", "signature")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    signature: str
    def __init__(self, key_id: _Optional[str] = ..., signature: _Optional[str] = ...) -> None: ...

class SignRefusal(_message.Message):
    __slots__ = ("reasons",)
    REASONS_FIELD_NUMBER: _ClassVar[int]
    reasons: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, reasons: _Optional[_Iterable[str]] = ...) -> None: ...
