from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PollRequest(_message.Message):
    __slots__ = ("wire_version", "has", "told", "tags", "wait_s", "root", "tier_role")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    HAS_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    TIER_ROLE_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    has: int
    told: int
    tags: _containers.RepeatedScalarFieldContainer[str]
    wait_s: float
    root: int
    tier_role: int
    def __init__(self, wire_version: _Optional[int] = ..., has: _Optional[int] = ..., told: _Optional[int] = ..., tags: _Optional[_Iterable[str]] = ..., wait_s: _Optional[float] = ..., root: _Optional[int] = ..., tier_role: _Optional[int] = ...) -> None: ...

class PollReply(_message.Message):
    __slots__ = ("version", "root", "timestamp", "tier_role", "again_s")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    TIER_ROLE_FIELD_NUMBER: _ClassVar[int]
    AGAIN_S_FIELD_NUMBER: _ClassVar[int]
    version: int
    root: int
    timestamp: int
    tier_role: int
    again_s: float
    def __init__(self, version: _Optional[int] = ..., root: _Optional[int] = ..., timestamp: _Optional[int] = ..., tier_role: _Optional[int] = ..., again_s: _Optional[float] = ...) -> None: ...

class FileRequest(_message.Message):
    __slots__ = ("name", "offset", "maximum")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    MAXIMUM_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    maximum: int
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., maximum: _Optional[int] = ...) -> None: ...

class FilePart(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class DeltaRequest(_message.Message):
    __slots__ = ("base", "version")
    BASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    base: int
    version: int
    def __init__(self, base: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class KeyRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class KeyReply(_message.Message):
    __slots__ = ("wrapped",)
    WRAPPED_FIELD_NUMBER: _ClassVar[int]
    wrapped: bytes
    def __init__(self, wrapped: _Optional[bytes] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("version", "kind", "value")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    version: int
    kind: str
    value: float
    def __init__(self, version: _Optional[int] = ..., kind: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class NoteRequest(_message.Message):
    __slots__ = ("reports",)
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    reports: _containers.RepeatedCompositeFieldContainer[Report]
    def __init__(self, reports: _Optional[_Iterable[_Union[Report, _Mapping]]] = ...) -> None: ...

class NoteReply(_message.Message):
    __slots__ = ("outcomes",)
    class Outcome(_message.Message):
        __slots__ = ("kind", "reason")
        class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
            __slots__ = ()
            KIND_UNSPECIFIED: _ClassVar[NoteReply.Outcome.Kind]
            COUNTED: _ClassVar[NoteReply.Outcome.Kind]
            KNOWN: _ClassVar[NoteReply.Outcome.Kind]
            REFUSED: _ClassVar[NoteReply.Outcome.Kind]
        KIND_UNSPECIFIED: NoteReply.Outcome.Kind
        COUNTED: NoteReply.Outcome.Kind
        KNOWN: NoteReply.Outcome.Kind
        REFUSED: NoteReply.Outcome.Kind
        KIND_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        kind: NoteReply.Outcome.Kind
        reason: str
        def __init__(self, kind: _Optional[_Union[NoteReply.Outcome.Kind, str]] = ..., reason: _Optional[str] = ...) -> None: ...
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[NoteReply.Outcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[NoteReply.Outcome, _Mapping]]] = ...) -> None: ...
