from fedge.wire.v1 import records_pb2 as _records_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OfferedTask(_message.Message):
    __slots__ = ("name", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("wire_version", "fedge_version", "tasks", "tags", "working_on", "cores", "memory_bytes", "bundle_sha256")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    FEDGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    WORKING_ON_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_SHA256_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    fedge_version: str
    tasks: _containers.RepeatedCompositeFieldContainer[OfferedTask]
    tags: _containers.RepeatedScalarFieldContainer[str]
    working_on: _containers.RepeatedScalarFieldContainer[str]
    cores: int
    memory_bytes: int
    bundle_sha256: bytes
    def __init__(self, wire_version: _Optional[int] = ..., fedge_version: _Optional[str] = ..., tasks: _Optional[_Iterable[_Union[OfferedTask, _Mapping]]] = ..., tags: _Optional[_Iterable[str]] = ..., working_on: _Optional[_Iterable[str]] = ..., cores: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., bundle_sha256: _Optional[bytes] = ...) -> None: ...

class Idle(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DeviceMessage(_message.Message):
    __slots__ = ("hello", "idle")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    idle: Idle
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., idle: _Optional[_Union[Idle, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("wire_version", "server_time", "device_id", "tier", "ca_bundle", "fedge_version")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    CA_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    FEDGE_VERSION_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    server_time: float
    device_id: str
    tier: str
    ca_bundle: bytes
    fedge_version: str
    def __init__(self, wire_version: _Optional[int] = ..., server_time: _Optional[float] = ..., device_id: _Optional[str] = ..., tier: _Optional[str] = ..., ca_bundle: _Optional[bytes] = ..., fedge_version: _Optional[str] = ...) -> None: ...

class Work(_message.Message):
    __slots__ = ("message_id", "run_id", "task", "task_digest", "message_type", "group_id", "content", "seconds_left", "max_result_bytes", "node_id")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TASK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_TYPE_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    MAX_RESULT_BYTES_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    run_id: str
    task: str
    task_digest: str
    message_type: str
    group_id: str
    content: _records_pb2.Content
    seconds_left: float
    max_result_bytes: int
    node_id: int
    def __init__(self, message_id: _Optional[str] = ..., run_id: _Optional[str] = ..., task: _Optional[str] = ..., task_digest: _Optional[str] = ..., message_type: _Optional[str] = ..., group_id: _Optional[str] = ..., content: _Optional[_Union[_records_pb2.Content, _Mapping]] = ..., seconds_left: _Optional[float] = ..., max_result_bytes: _Optional[int] = ..., node_id: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("message_id",)
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    def __init__(self, message_id: _Optional[str] = ...) -> None: ...

class NewBundle(_message.Message):
    __slots__ = ("ca_bundle",)
    CA_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    ca_bundle: bytes
    def __init__(self, ca_bundle: _Optional[bytes] = ...) -> None: ...

class HubMessage(_message.Message):
    __slots__ = ("welcome", "work", "cancel", "new_bundle")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    NEW_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    work: Work
    cancel: Cancel
    new_bundle: NewBundle
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., work: _Optional[_Union[Work, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., new_bundle: _Optional[_Union[NewBundle, _Mapping]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("message_id", "sha256", "offset")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    sha256: bytes
    offset: int
    def __init__(self, message_id: _Optional[str] = ..., sha256: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class TurnRequest(_message.Message):
    __slots__ = ("message_id", "kind", "sha256")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[TurnRequest.Kind]
        FETCH: _ClassVar[TurnRequest.Kind]
        SUBMIT: _ClassVar[TurnRequest.Kind]
    KIND_UNSPECIFIED: TurnRequest.Kind
    FETCH: TurnRequest.Kind
    SUBMIT: TurnRequest.Kind
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    kind: TurnRequest.Kind
    sha256: bytes
    def __init__(self, message_id: _Optional[str] = ..., kind: _Optional[_Union[TurnRequest.Kind, str]] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class TurnReply(_message.Message):
    __slots__ = ("wanted", "granted", "offset")
    WANTED_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    wanted: bool
    granted: bool
    offset: int
    def __init__(self, wanted: bool = ..., granted: bool = ..., offset: _Optional[int] = ...) -> None: ...

class SubmitHeader(_message.Message):
    __slots__ = ("message_id", "result", "offset")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    result: bytes
    offset: int
    def __init__(self, message_id: _Optional[str] = ..., result: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class SubmitPart(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: SubmitHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[SubmitHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("outcome", "reason")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[SubmitReply.Outcome]
        ACCEPTED: _ClassVar[SubmitReply.Outcome]
        TOO_LATE: _ClassVar[SubmitReply.Outcome]
        REFUSED: _ClassVar[SubmitReply.Outcome]
        INCOMPLETE: _ClassVar[SubmitReply.Outcome]
    OUTCOME_UNSPECIFIED: SubmitReply.Outcome
    ACCEPTED: SubmitReply.Outcome
    TOO_LATE: SubmitReply.Outcome
    REFUSED: SubmitReply.Outcome
    INCOMPLETE: SubmitReply.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    outcome: SubmitReply.Outcome
    reason: str
    def __init__(self, outcome: _Optional[_Union[SubmitReply.Outcome, str]] = ..., reason: _Optional[str] = ...) -> None: ...
