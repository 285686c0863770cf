from google.protobuf import empty_pb2 as _empty_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Value(_message.Message):
    __slots__ = ("svalue", "ivalue", "fvalue", "bvalue", "mvalue", "lvalue", "nvalue", "dvalue")
    SVALUE_FIELD_NUMBER: _ClassVar[int]
    IVALUE_FIELD_NUMBER: _ClassVar[int]
    FVALUE_FIELD_NUMBER: _ClassVar[int]
    BVALUE_FIELD_NUMBER: _ClassVar[int]
    MVALUE_FIELD_NUMBER: _ClassVar[int]
    LVALUE_FIELD_NUMBER: _ClassVar[int]
    NVALUE_FIELD_NUMBER: _ClassVar[int]
    DVALUE_FIELD_NUMBER: _ClassVar[int]
    svalue: str
    ivalue: int
    fvalue: float
    bvalue: bool
    mvalue: Dictionary
    lvalue: List
    nvalue: _struct_pb2.NullValue
    dvalue: float
    def __init__(self, svalue: _Optional[str] = ..., ivalue: _Optional[int] = ..., fvalue: _Optional[float] = ..., bvalue: bool = ..., mvalue: _Optional[_Union[Dictionary, _Mapping]] = ..., lvalue: _Optional[_Union[List, _Mapping]] = ..., nvalue: _Optional[_Union[_struct_pb2.NullValue, str]] = ..., dvalue: _Optional[float] = ...) -> None: ...

class Dictionary(_message.Message):
    __slots__ = ("values",)
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.MessageMap[str, Value]
    def __init__(self, values: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class List(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedCompositeFieldContainer[Value]
    def __init__(self, values: _Optional[_Iterable[_Union[Value, _Mapping]]] = ...) -> None: ...

class SingleStringRequest(_message.Message):
    __slots__ = ("request", "query_kwargs")
    class QueryKwargsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    QUERY_KWARGS_FIELD_NUMBER: _ClassVar[int]
    request: str
    query_kwargs: _containers.MessageMap[str, Value]
    def __init__(self, request: _Optional[str] = ..., query_kwargs: _Optional[_Mapping[str, Value]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class MultiStringRequest(_message.Message):
    __slots__ = ("request", "query_kwargs", "token_prompts", "positions")
    class QueryKwargsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Value
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Value, _Mapping]] = ...) -> None: ...
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    QUERY_KWARGS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    request: _containers.RepeatedScalarFieldContainer[str]
    query_kwargs: _containers.MessageMap[str, Value]
    token_prompts: _containers.RepeatedCompositeFieldContainer[TokenIds]
    positions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request: _Optional[_Iterable[str]] = ..., query_kwargs: _Optional[_Mapping[str, Value]] = ..., token_prompts: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ..., positions: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "token", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    token: bytes
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, token_id: _Optional[int] = ..., token: _Optional[bytes] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class SingleGenerationReply(_message.Message):
    __slots__ = ("response", "finish_reason", "prompt_tokens", "generated_tokens", "time_taken", "model_time_taken", "index", "logprobs", "error", "prompt_logprobs")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIME_TAKEN_FIELD_NUMBER: _ClassVar[int]
    MODEL_TIME_TAKEN_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    response: str
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    time_taken: float
    model_time_taken: float
    index: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    error: str
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, response: _Optional[str] = ..., finish_reason: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., time_taken: _Optional[float] = ..., model_time_taken: _Optional[float] = ..., index: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ..., error: _Optional[str] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class MultiGenerationReply(_message.Message):
    __slots__ = ("response",)
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    response: _containers.RepeatedCompositeFieldContainer[SingleGenerationReply]
    def __init__(self, response: _Optional[_Iterable[_Union[SingleGenerationReply, _Mapping]]] = ...) -> None: ...

class CallStart(_message.Message):
    __slots__ = ("call", "request", "request_id")
    CALL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    call: int
    request: bytes
    request_id: str
    def __init__(self, call: _Optional[int] = ..., request: _Optional[bytes] = ..., request_id: _Optional[str] = ...) -> None: ...

class CallerMessage(_message.Message):
    __slots__ = ("starts", "cancels")
    STARTS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    starts: _containers.RepeatedCompositeFieldContainer[CallStart]
    cancels: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, starts: _Optional[_Iterable[_Union[CallStart, _Mapping]]] = ..., cancels: _Optional[_Iterable[int]] = ...) -> None: ...

class CallReply(_message.Message):
    __slots__ = ("call", "response")
    CALL_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    call: int
    response: _containers.RepeatedCompositeFieldContainer[SingleGenerationReply]
    def __init__(self, call: _Optional[int] = ..., response: _Optional[_Iterable[_Union[SingleGenerationReply, _Mapping]]] = ...) -> None: ...

class CallEnd(_message.Message):
    __slots__ = ("call", "code", "details", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CALL_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    call: int
    code: int
    details: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, call: _Optional[int] = ..., code: _Optional[int] = ..., details: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("replies", "ends")
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    replies: _containers.RepeatedCompositeFieldContainer[CallReply]
    ends: _containers.RepeatedCompositeFieldContainer[CallEnd]
    def __init__(self, replies: _Optional[_Iterable[_Union[CallReply, _Mapping]]] = ..., ends: _Optional[_Iterable[_Union[CallEnd, _Mapping]]] = ...) -> None: ...

class HealthReply(_message.Message):
    __slots__ = ("ready", "reason", "replicas")
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    ready: bool
    reason: str
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaHealth]
    def __init__(self, ready: bool = ..., reason: _Optional[str] = ..., replicas: _Optional[_Iterable[_Union[ReplicaHealth, _Mapping]]] = ...) -> None: ...

class ReplicaHealth(_message.Message):
    __slots__ = ("address", "ready", "reason", "max_length", "vocab_size", "device", "dtype", "outstanding")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    OUTSTANDING_FIELD_NUMBER: _ClassVar[int]
    address: str
    ready: bool
    reason: str
    max_length: int
    vocab_size: int
    device: str
    dtype: str
    outstanding: int
    def __init__(self, address: _Optional[str] = ..., ready: bool = ..., reason: _Optional[str] = ..., max_length: _Optional[int] = ..., vocab_size: _Optional[int] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., outstanding: _Optional[int] = ...) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...
