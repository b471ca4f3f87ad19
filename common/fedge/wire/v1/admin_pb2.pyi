from fedge.wire.v1 import records_pb2 as _records_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("session", "default_deadline_s")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    session: str
    default_deadline_s: float
    def __init__(self, session: _Optional[str] = ..., default_deadline_s: _Optional[float] = ...) -> None: ...

class Selection(_message.Message):
    __slots__ = ("task", "task_digest", "tiers", "tags", "max_seconds")
    TASK_FIELD_NUMBER: _ClassVar[int]
    TASK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    MAX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    task: str
    task_digest: str
    tiers: _containers.RepeatedScalarFieldContainer[str]
    tags: _containers.RepeatedScalarFieldContainer[str]
    max_seconds: float
    def __init__(self, task: _Optional[str] = ..., task_digest: _Optional[str] = ..., tiers: _Optional[_Iterable[str]] = ..., tags: _Optional[_Iterable[str]] = ..., max_seconds: _Optional[float] = ...) -> None: ...

class NodesRequest(_message.Message):
    __slots__ = ("run_id", "selection", "at_least", "timeout_s")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    selection: Selection
    at_least: int
    timeout_s: float
    def __init__(self, run_id: _Optional[str] = ..., selection: _Optional[_Union[Selection, _Mapping]] = ..., at_least: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class NodesReply(_message.Message):
    __slots__ = ("node_ids",)
    NODE_IDS_FIELD_NUMBER: _ClassVar[int]
    node_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, node_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Outgoing(_message.Message):
    __slots__ = ("message_id", "node_id", "content")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    node_id: int
    content: int
    def __init__(self, message_id: _Optional[str] = ..., node_id: _Optional[int] = ..., content: _Optional[int] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("run_id", "session", "task", "task_digest", "message_type", "group_id", "deadline_s", "max_result_bytes", "contents", "messages")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TASK_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_TYPE_FIELD_NUMBER: _ClassVar[int]
    GROUP_ID_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    MAX_RESULT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTENTS_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    session: str
    task: str
    task_digest: str
    message_type: str
    group_id: str
    deadline_s: float
    max_result_bytes: int
    contents: _containers.RepeatedCompositeFieldContainer[_records_pb2.Content]
    messages: _containers.RepeatedCompositeFieldContainer[Outgoing]
    def __init__(self, run_id: _Optional[str] = ..., session: _Optional[str] = ..., task: _Optional[str] = ..., task_digest: _Optional[str] = ..., message_type: _Optional[str] = ..., group_id: _Optional[str] = ..., deadline_s: _Optional[float] = ..., max_result_bytes: _Optional[int] = ..., contents: _Optional[_Iterable[_Union[_records_pb2.Content, _Mapping]]] = ..., messages: _Optional[_Iterable[_Union[Outgoing, _Mapping]]] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RepliesRequest(_message.Message):
    __slots__ = ("run_id", "session", "message_ids")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    session: str
    message_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, run_id: _Optional[str] = ..., session: _Optional[str] = ..., message_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("message_id", "node_id", "result", "spool")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    SPOOL_FIELD_NUMBER: _ClassVar[int]
    message_id: str
    node_id: int
    result: bytes
    spool: str
    def __init__(self, message_id: _Optional[str] = ..., node_id: _Optional[int] = ..., result: _Optional[bytes] = ..., spool: _Optional[str] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("run_id", "session", "message_ids")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    session: str
    message_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, run_id: _Optional[str] = ..., session: _Optional[str] = ..., message_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class CloseReply(_message.Message):
    __slots__ = ("late", "bytes_down", "bytes_up")
    LATE_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    late: int
    bytes_down: int
    bytes_up: int
    def __init__(self, late: _Optional[int] = ..., bytes_down: _Optional[int] = ..., bytes_up: _Optional[int] = ...) -> None: ...

class RefreshRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RefreshReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OnlineDevice(_message.Message):
    __slots__ = ("device_id", "node_id", "tier", "tags", "tasks", "connected_since", "messages_open", "seconds")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_SINCE_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_OPEN_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    node_id: int
    tier: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    tasks: _containers.RepeatedScalarFieldContainer[str]
    connected_since: float
    messages_open: int
    seconds: float
    def __init__(self, device_id: _Optional[str] = ..., node_id: _Optional[int] = ..., tier: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., tasks: _Optional[_Iterable[str]] = ..., connected_since: _Optional[float] = ..., messages_open: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class RunningWorker(_message.Message):
    __slots__ = ("run_id", "pid", "restarts")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    pid: int
    restarts: int
    def __init__(self, run_id: _Optional[str] = ..., pid: _Optional[int] = ..., restarts: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("devices", "workers", "since")
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[OnlineDevice]
    workers: _containers.RepeatedCompositeFieldContainer[RunningWorker]
    since: float
    def __init__(self, devices: _Optional[_Iterable[_Union[OnlineDevice, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[RunningWorker, _Mapping]]] = ..., since: _Optional[float] = ...) -> None: ...
