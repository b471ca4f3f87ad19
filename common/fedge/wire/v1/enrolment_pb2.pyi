from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolRequest(_message.Message):
    __slots__ = ("wire_version", "token", "csr", "sealing_key", "fedge_version")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    SEALING_KEY_FIELD_NUMBER: _ClassVar[int]
    FEDGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    token: str
    csr: bytes
    sealing_key: bytes
    fedge_version: str
    def __init__(self, wire_version: _Optional[int] = ..., token: _Optional[str] = ..., csr: _Optional[bytes] = ..., sealing_key: _Optional[bytes] = ..., fedge_version: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("wire_version", "csr", "time", "signature")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    csr: bytes
    time: float
    signature: bytes
    def __init__(self, wire_version: _Optional[int] = ..., csr: _Optional[bytes] = ..., time: _Optional[float] = ..., signature: _Optional[bytes] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("certificate", "ca_bundle", "device_id", "tier", "link_address", "enrolment_address", "server_time", "node_id", "trusted_root", "floor")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CA_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    LINK_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ENROLMENT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    TRUSTED_ROOT_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    ca_bundle: bytes
    device_id: str
    tier: str
    link_address: str
    enrolment_address: str
    server_time: float
    node_id: int
    trusted_root: bytes
    floor: int
    def __init__(self, certificate: _Optional[bytes] = ..., ca_bundle: _Optional[bytes] = ..., device_id: _Optional[str] = ..., tier: _Optional[str] = ..., link_address: _Optional[str] = ..., enrolment_address: _Optional[str] = ..., server_time: _Optional[float] = ..., node_id: _Optional[int] = ..., trusted_root: _Optional[bytes] = ..., floor: _Optional[int] = ...) -> None: ...
