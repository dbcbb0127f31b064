from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Address(_message.Message):
    __slots__ = ("peer_id", "multiaddrs")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    MULTIADDRS_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    multiaddrs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, peer_id: _Optional[str] = ..., multiaddrs: _Optional[_Iterable[str]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "logit_bias", "logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logit_bias: _containers.ScalarMap[int, float]
    logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., logprobs: _Optional[int] = ...) -> None: ...

class HopTiming(_message.Message):
    __slots__ = ("peer_id", "start", "end", "queue_us", "compute_us", "batch", "link_us")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LINK_US_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    start: int
    end: int
    queue_us: int
    compute_us: int
    batch: int
    link_us: int
    def __init__(self, peer_id: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., queue_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., batch: _Optional[int] = ..., link_us: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "peer_id", "epoch")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    peer_id: str
    epoch: int
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., peer_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("session", "epoch", "model", "start", "end", "max_positions", "keep", "previous", "step_mode", "no_kv_cache", "sampling", "token_ids", "end_ids", "stop_at", "prompt_length", "speculate", "prefix", "input_wire", "output_wire", "kv")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    STEP_MODE_FIELD_NUMBER: _ClassVar[int]
    NO_KV_CACHE_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    END_IDS_FIELD_NUMBER: _ClassVar[int]
    STOP_AT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SPECULATE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    INPUT_WIRE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_WIRE_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    model: str
    start: int
    end: int
    max_positions: int
    keep: int
    previous: _containers.RepeatedScalarFieldContainer[str]
    step_mode: bool
    no_kv_cache: bool
    sampling: Sampling
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    end_ids: _containers.RepeatedScalarFieldContainer[int]
    stop_at: int
    prompt_length: int
    speculate: bool
    prefix: bytes
    input_wire: str
    output_wire: str
    kv: str
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., model: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., max_positions: _Optional[int] = ..., keep: _Optional[int] = ..., previous: _Optional[_Iterable[str]] = ..., step_mode: _Optional[bool] = ..., no_kv_cache: _Optional[bool] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., end_ids: _Optional[_Iterable[int]] = ..., stop_at: _Optional[int] = ..., prompt_length: _Optional[int] = ..., speculate: _Optional[bool] = ..., prefix: _Optional[bytes] = ..., input_wire: _Optional[str] = ..., output_wire: _Optional[str] = ..., kv: _Optional[str] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("epoch", "targets")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    targets: _containers.RepeatedCompositeFieldContainer[Target]
    def __init__(self, epoch: _Optional[int] = ..., targets: _Optional[_Iterable[_Union[Target, _Mapping]]] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("epoch", "peer", "forward_from", "layer")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FROM_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    peer: Address
    forward_from: int
    layer: int
    def __init__(self, epoch: _Optional[int] = ..., peer: _Optional[_Union[Address, _Mapping]] = ..., forward_from: _Optional[int] = ..., layer: _Optional[int] = ...) -> None: ...

class Input(_message.Message):
    __slots__ = ("epoch", "start", "token_ids", "step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    step: Step
    def __init__(self, epoch: _Optional[int] = ..., start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., step: _Optional[_Union[Step, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("number", "answer_from", "hidden")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FROM_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    number: int
    answer_from: int
    hidden: bool
    def __init__(self, number: _Optional[int] = ..., answer_from: _Optional[int] = ..., hidden: _Optional[bool] = ...) -> None: ...

class ControlRequest(_message.Message):
    __slots__ = ("open", "start", "input", "ping", "finish", "fetch")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    open: Open
    start: Start
    input: Input
    ping: bool
    finish: Finish
    fetch: Fetch
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., input: _Optional[_Union[Input, _Mapping]] = ..., ping: _Optional[bool] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("number", "start", "end")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    number: int
    start: int
    end: int
    def __init__(self, number: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("prefix",)
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: bytes
    def __init__(self, prefix: _Optional[bytes] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("epoch", "have", "log_start", "computed", "heartbeat_s")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    LOG_START_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    have: int
    log_start: int
    computed: int
    heartbeat_s: float
    def __init__(self, epoch: _Optional[int] = ..., have: _Optional[int] = ..., log_start: _Optional[int] = ..., computed: _Optional[int] = ..., heartbeat_s: _Optional[float] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("epoch", "start", "token_ids", "tensor", "hops", "logprobs", "step", "hidden")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    tensor: Tensor
    hops: _containers.RepeatedScalarFieldContainer[bytes]
    logprobs: _containers.RepeatedCompositeFieldContainer[Logprobs]
    step: int
    hidden: Tensor
    def __init__(self, epoch: _Optional[int] = ..., start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., hops: _Optional[_Iterable[bytes]] = ..., logprobs: _Optional[_Iterable[_Union[Logprobs, _Mapping]]] = ..., step: _Optional[int] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("logprob", "top_ids", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("epoch", "have", "computing", "draining", "computed")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    COMPUTING_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    have: int
    computing: bool
    draining: bool
    computed: int
    def __init__(self, epoch: _Optional[int] = ..., have: _Optional[int] = ..., computing: _Optional[bool] = ..., draining: _Optional[bool] = ..., computed: _Optional[int] = ...) -> None: ...

class Fetched(_message.Message):
    __slots__ = ("number", "log_start", "hidden")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LOG_START_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    number: int
    log_start: int
    hidden: Tensor
    def __init__(self, number: _Optional[int] = ..., log_start: _Optional[int] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class ControlReply(_message.Message):
    __slots__ = ("opened", "output", "status", "error", "fetched")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    output: Output
    status: Status
    error: Error
    fetched: Fetched
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., status: _Optional[_Union[Status, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., fetched: _Optional[_Union[Fetched, _Mapping]] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("session", "epoch", "sequence", "start", "hidden", "token_ids", "hops", "want_ack", "layer", "draft", "draft_start", "step")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    WANT_ACK_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    DRAFT_START_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    sequence: int
    start: int
    hidden: Tensor
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    hops: _containers.RepeatedScalarFieldContainer[bytes]
    want_ack: bool
    layer: int
    draft: int
    draft_start: int
    step: Step
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., start: _Optional[int] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., hops: _Optional[_Iterable[bytes]] = ..., want_ack: _Optional[bool] = ..., layer: _Optional[int] = ..., draft: _Optional[int] = ..., draft_start: _Optional[int] = ..., step: _Optional[_Union[Step, _Mapping]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("session", "epoch", "sequence", "layer")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    sequence: int
    layer: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., layer: _Optional[int] = ...) -> None: ...

class LinkMessage(_message.Message):
    __slots__ = ("frame", "ack", "refusal", "ping", "pong")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    frame: Frame
    ack: Ack
    refusal: Refusal
    ping: int
    pong: int
    def __init__(self, frame: _Optional[_Union[Frame, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., ping: _Optional[int] = ..., pong: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("session", "epoch", "error", "layer")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    session: str
    epoch: int
    error: Error
    layer: int
    def __init__(self, session: _Optional[str] = ..., epoch: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., layer: _Optional[int] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ("describe", "model_file", "echo", "plan", "probe_me", "probe", "dial_me")
    DESCRIBE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FILE_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PROBE_ME_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    DIAL_ME_FIELD_NUMBER: _ClassVar[int]
    describe: bool
    model_file: str
    echo: int
    plan: PlanRequest
    probe_me: ProbeMe
    probe: Probe
    dial_me: DialMe
    def __init__(self, describe: _Optional[bool] = ..., model_file: _Optional[str] = ..., echo: _Optional[int] = ..., plan: _Optional[_Union[PlanRequest, _Mapping]] = ..., probe_me: _Optional[_Union[ProbeMe, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ..., dial_me: _Optional[_Union[DialMe, _Mapping]] = ...) -> None: ...

class DialMe(_message.Message):
    __slots__ = ("peer",)
    PEER_FIELD_NUMBER: _ClassVar[int]
    peer: Address
    def __init__(self, peer: _Optional[_Union[Address, _Mapping]] = ...) -> None: ...

class DialledBack(_message.Message):
    __slots__ = ("seen_at", "dials")
    SEEN_AT_FIELD_NUMBER: _ClassVar[int]
    DIALS_FIELD_NUMBER: _ClassVar[int]
    seen_at: str
    dials: _containers.RepeatedCompositeFieldContainer[Dial]
    def __init__(self, seen_at: _Optional[str] = ..., dials: _Optional[_Iterable[_Union[Dial, _Mapping]]] = ...) -> None: ...

class Dial(_message.Message):
    __slots__ = ("multiaddr", "error")
    MULTIADDR_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    multiaddr: str
    error: str
    def __init__(self, multiaddr: _Optional[str] = ..., error: _Optional[str] = ...) -> None: ...

class ProbeMe(_message.Message):
    __slots__ = ("peer", "model", "start", "end")
    PEER_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    peer: Address
    model: str
    start: int
    end: int
    def __init__(self, peer: _Optional[_Union[Address, _Mapping]] = ..., model: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("start", "end", "token_ids", "hidden")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    hidden: Tensor
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Voucher(_message.Message):
    __slots__ = ("verifier", "at", "signature")
    VERIFIER_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    verifier: str
    at: float
    signature: bytes
    def __init__(self, verifier: _Optional[str] = ..., at: _Optional[float] = ..., signature: _Optional[bytes] = ...) -> None: ...

class PlanRequest(_message.Message):
    __slots__ = ("tokens", "exclude")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    exclude: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tokens: _Optional[int] = ..., exclude: _Optional[_Iterable[str]] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("model", "start", "end", "state", "version", "profile_json", "files", "sessions", "kv_bytes_used", "kv_bytes_kept")
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PROFILE_JSON_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_KEPT_FIELD_NUMBER: _ClassVar[int]
    model: str
    start: int
    end: int
    state: str
    version: str
    profile_json: str
    files: _containers.ScalarMap[str, int]
    sessions: int
    kv_bytes_used: int
    kv_bytes_kept: int
    def __init__(self, model: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., state: _Optional[str] = ..., version: _Optional[str] = ..., profile_json: _Optional[str] = ..., files: _Optional[_Mapping[str, int]] = ..., sessions: _Optional[int] = ..., kv_bytes_used: _Optional[int] = ..., kv_bytes_kept: _Optional[int] = ...) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("description", "chunk", "echo", "error", "plan", "voucher", "probed", "dialled_back")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ECHO_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    VOUCHER_FIELD_NUMBER: _ClassVar[int]
    PROBED_FIELD_NUMBER: _ClassVar[int]
    DIALLED_BACK_FIELD_NUMBER: _ClassVar[int]
    description: Description
    chunk: bytes
    echo: int
    error: Error
    plan: RouteNews
    voucher: Voucher
    probed: bytes
    dialled_back: DialledBack
    def __init__(self, description: _Optional[_Union[Description, _Mapping]] = ..., chunk: _Optional[bytes] = ..., echo: _Optional[int] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., plan: _Optional[_Union[RouteNews, _Mapping]] = ..., voucher: _Optional[_Union[Voucher, _Mapping]] = ..., probed: _Optional[bytes] = ..., dialled_back: _Optional[_Union[DialledBack, _Mapping]] = ...) -> None: ...

class Delegate(_message.Message):
    __slots__ = ("model", "prompt", "generated", "max_tokens", "sampling", "end_ids", "no_kv_cache", "speculate", "wire", "cuts", "kv")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    END_IDS_FIELD_NUMBER: _ClassVar[int]
    NO_KV_CACHE_FIELD_NUMBER: _ClassVar[int]
    SPECULATE_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    generated: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    sampling: Sampling
    end_ids: _containers.RepeatedScalarFieldContainer[int]
    no_kv_cache: bool
    speculate: bool
    wire: str
    cuts: _containers.RepeatedScalarFieldContainer[int]
    kv: str
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., generated: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., end_ids: _Optional[_Iterable[int]] = ..., no_kv_cache: _Optional[bool] = ..., speculate: _Optional[bool] = ..., wire: _Optional[str] = ..., cuts: _Optional[_Iterable[int]] = ..., kv: _Optional[str] = ...) -> None: ...

class RouteNews(_message.Message):
    __slots__ = ("epoch", "reason", "hops", "rebuilt")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    REBUILT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    reason: str
    hops: _containers.RepeatedCompositeFieldContainer[RouteHop]
    rebuilt: Rebuilt
    def __init__(self, epoch: _Optional[int] = ..., reason: _Optional[str] = ..., hops: _Optional[_Iterable[_Union[RouteHop, _Mapping]]] = ..., rebuilt: _Optional[_Union[Rebuilt, _Mapping]] = ...) -> None: ...

class Rebuilt(_message.Message):
    __slots__ = ("token_index", "kept", "lost", "replayed", "duration_us")
    TOKEN_INDEX_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    DURATION_US_FIELD_NUMBER: _ClassVar[int]
    token_index: int
    kept: int
    lost: _containers.RepeatedCompositeFieldContainer[RouteHop]
    replayed: _containers.RepeatedCompositeFieldContainer[Replayed]
    duration_us: int
    def __init__(self, token_index: _Optional[int] = ..., kept: _Optional[int] = ..., lost: _Optional[_Iterable[_Union[RouteHop, _Mapping]]] = ..., replayed: _Optional[_Iterable[_Union[Replayed, _Mapping]]] = ..., duration_us: _Optional[int] = ...) -> None: ...

class Replayed(_message.Message):
    __slots__ = ("start", "end", "positions")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    positions: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., positions: _Optional[int] = ...) -> None: ...

class RouteHop(_message.Message):
    __slots__ = ("peer", "start", "end")
    PEER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    peer: Address
    start: int
    end: int
    def __init__(self, peer: _Optional[_Union[Address, _Mapping]] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class DelegateReply(_message.Message):
    __slots__ = ("route", "token", "finished", "error", "heartbeat_s")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_S_FIELD_NUMBER: _ClassVar[int]
    route: RouteNews
    token: Output
    finished: str
    error: Error
    heartbeat_s: float
    def __init__(self, route: _Optional[_Union[RouteNews, _Mapping]] = ..., token: _Optional[_Union[Output, _Mapping]] = ..., finished: _Optional[str] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., heartbeat_s: _Optional[float] = ...) -> None: ...
