from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InferExamples(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class InferFile(_message.Message):
    __slots__ = ("kind", "data")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    kind: str
    data: bytes
    def __init__(self, kind: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class InferRequest(_message.Message):
    __slots__ = ("wire_version", "version", "examples", "file", "text")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    version: int
    examples: InferExamples
    file: InferFile
    text: str
    def __init__(self, wire_version: _Optional[int] = ..., version: _Optional[int] = ..., examples: _Optional[_Union[InferExamples, _Mapping]] = ..., file: _Optional[_Union[InferFile, _Mapping]] = ..., text: _Optional[str] = ...) -> None: ...

class InferAnswer(_message.Message):
    __slots__ = ("label", "confidence", "probabilities", "source", "why")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    label: str
    confidence: float
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    source: str
    why: str
    def __init__(self, label: _Optional[str] = ..., confidence: _Optional[float] = ..., probabilities: _Optional[_Iterable[float]] = ..., source: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class InferReply(_message.Message):
    __slots__ = ("version", "model", "answers", "cloud_model")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    CLOUD_MODEL_FIELD_NUMBER: _ClassVar[int]
    version: int
    model: str
    answers: _containers.RepeatedCompositeFieldContainer[InferAnswer]
    cloud_model: str
    def __init__(self, version: _Optional[int] = ..., model: _Optional[str] = ..., answers: _Optional[_Iterable[_Union[InferAnswer, _Mapping]]] = ..., cloud_model: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("wire_version", "version")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    version: int
    def __init__(self, wire_version: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("version", "model", "task", "spec")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    version: int
    model: str
    task: str
    spec: str
    def __init__(self, version: _Optional[int] = ..., model: _Optional[str] = ..., task: _Optional[str] = ..., spec: _Optional[str] = ...) -> None: ...
