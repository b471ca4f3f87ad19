from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TelemetryWindow(_message.Message):
    __slots__ = ("format", "slot", "period_s", "version", "reference", "epsilon", "inputs", "confidence", "answers", "latency", "routes", "cpu_s", "memory_bytes", "lost")
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    PERIOD_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    CPU_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    format: int
    slot: int
    period_s: int
    version: int
    reference: bytes
    epsilon: float
    inputs: _containers.RepeatedScalarFieldContainer[int]
    confidence: _containers.RepeatedScalarFieldContainer[int]
    answers: _containers.RepeatedScalarFieldContainer[int]
    latency: _containers.RepeatedScalarFieldContainer[int]
    routes: _containers.RepeatedScalarFieldContainer[int]
    cpu_s: float
    memory_bytes: int
    lost: int
    def __init__(self, format: _Optional[int] = ..., slot: _Optional[int] = ..., period_s: _Optional[int] = ..., version: _Optional[int] = ..., reference: _Optional[bytes] = ..., epsilon: _Optional[float] = ..., inputs: _Optional[_Iterable[int]] = ..., confidence: _Optional[_Iterable[int]] = ..., answers: _Optional[_Iterable[int]] = ..., latency: _Optional[_Iterable[int]] = ..., routes: _Optional[_Iterable[int]] = ..., cpu_s: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., lost: _Optional[int] = ...) -> None: ...

class TelemetryRequest(_message.Message):
    __slots__ = ("windows",)
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    windows: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, windows: _Optional[_Iterable[bytes]] = ...) -> None: ...

class TelemetryReply(_message.Message):
    __slots__ = ("outcomes",)
    class Outcome(_message.Message):
        __slots__ = ("kind", "reason")
        class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
            __slots__ = ()
            KIND_UNSPECIFIED: _ClassVar[TelemetryReply.Outcome.Kind]
            COUNTED: _ClassVar[TelemetryReply.Outcome.Kind]
            KNOWN: _ClassVar[TelemetryReply.Outcome.Kind]
            REFUSED: _ClassVar[TelemetryReply.Outcome.Kind]
        KIND_UNSPECIFIED: TelemetryReply.Outcome.Kind
        COUNTED: TelemetryReply.Outcome.Kind
        KNOWN: TelemetryReply.Outcome.Kind
        REFUSED: TelemetryReply.Outcome.Kind
        KIND_FIELD_NUMBER: _ClassVar[int]
        REASON_FIELD_NUMBER: _ClassVar[int]
        kind: TelemetryReply.Outcome.Kind
        reason: str
        def __init__(self, kind: _Optional[_Union[TelemetryReply.Outcome.Kind, str]] = ..., reason: _Optional[str] = ...) -> None: ...
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[TelemetryReply.Outcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[TelemetryReply.Outcome, _Mapping]]] = ...) -> None: ...
