"""Settings: every default lives here, once. A file overrides it, the environment a file, a flag the environment."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_TEMPERATURE = 100.0
MIN_REPETITION_PENALTY = 0.01
MAX_REPETITION_PENALTY = 100.0
"""Here and in requests. Logits that are divided by far less leave float32."""
SPECULATIONS = ("auto", "off")
MAX_THREADS = 1024
"""torch ends the process for want of memory when it is to start many more."""
MAX_MEMORY_MB = 1 << 24
MOST_WINDOW_FRAMES = 32
"""Nobody sends more ahead, so whoever lets twice as many wait refuses none that come as they should: everybody has
settings of their own."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    name: str = "smollm2-135m"
    """Built-in name, folder, ``.gguf`` file or Hub id."""
    dtype: str = "float32"
    """float32 | bfloat16 | float16: of arithmetic, KV cache and hidden states; of weights, too, if ``auto``."""
    weights: str = "auto"
    """float32 | bfloat16 | int8 | int4: how matrices are stored; ``auto``: in ``dtype``."""


@dataclass(frozen=True, slots=True)
class InferenceSettings:
    max_tokens: int = 50
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 0.0
    """0: as the model's ``generation_config.json`` has it, mostly 1, which changes nothing."""
    enable_kv_cache: bool = True
    speculation: str = "auto"
    """auto | off: whether drafts may go round the ring with the tokens. They never change the text."""
    wire: str = "model"
    """model | bfloat16 | int8: how hidden states go from peer to peer; ``model``: in its dtype, see ``swarm.wire``."""
    kv: str = "model"
    """model | int8: how stages keep keys and values; ``model``: in its dtype, see ``swarm.kv``."""


@dataclass(frozen=True, slots=True)
class PeerSettings:
    layers: str = "auto"
    device: str = "auto"
    threads: int = 1
    """torch threads of the compute thread; 0: as many as torch likes."""
    prefill_threads: int = 0
    """... for passes over many rows, which wait for arithmetic and not for memory; 0: all cores."""
    max_memory_mb: int = 0
    """What the peer may take for weights, KV caches and checkpoint logs; 0: what the machine has free."""
    memory_safety_margin: float = 0.1
    max_cached_sessions: int = 64
    max_cache_tokens_per_session: int = 4096
    cache_eviction_policy: str = "lru"
    kv_budget_mb: int = 1024
    """KV caches and checkpoint logs together, where ``max_memory_mb`` does not say otherwise."""
    prefix_cache: bool = True
    """Keep what ended sessions computed for their owners' next ones, in memory that no session needs."""
    checkpoints: bool = True
    """Keep each session's outputs so that a lost successor can be replayed."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0
    """Where Prometheus finds ``/metrics``; 0: nowhere."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    max_batch_tokens: int = 512
    """Rows in one forward pass, decode steps first."""
    mixed_prefill_tokens: int = 16
    """Rows of a prompt between two decode steps of other sessions, until it is known how long these take."""
    prefill_chunk_tokens: int = 128
    """A long prompt goes in pieces of this size, so that stages work on different ones at once."""
    replay_chunk_tokens: int = 256
    """What a new stage computes again comes in pieces of this size; the others wait for it alone."""


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    initial_peers: tuple[str, ...] = ()
    host_maddrs: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    announce_maddrs: tuple[str, ...] = ()
    unix_sockets: bool = True
    """Sessions' streams between processes of one user on one machine go past p2pd, but not those of a peer that
    has ``announce_maddrs``: it wants to be reached at those."""
    identity: str = ""
    """Key file, and ``FILE.peers`` for whom it met; empty: a fresh identity for this process."""
    nat_port_map: bool = False
    auto_nat: bool = False
    use_relay: bool = False


@dataclass(frozen=True, slots=True)
class DiscoverySettings:
    announce_ttl_s: float = 45.0
    announce_period_s: float = 15.0
    view_period_s: float = 10.0
    layers_per_bucket: int = 8
    ping_period_s: float = 30.0


@dataclass(frozen=True, slots=True)
class TimeoutSettings:
    daemon_start_s: float = 60.0
    connect_s: float = 3.0
    open_s: float = 10.0
    """From Open to Opened on a connected stream; a peer that does not even beat meanwhile is lost as at other times,
    and one with a step to end has longer if that follows from what it announced."""
    send_s: float = 10.0
    """One blocked write, or a frame of a prompt of which nothing is heard to arrive."""
    heartbeat_s: float = 1.0
    heartbeat_misses: int = 3
    step_floor_s: float = 5.0
    """A token may always take this long."""
    step_factor: float = 20.0
    """... or this many times the measured median, if that is longer."""
    step_slow_factor: float = 6.0
    """... and this many times longer while a heartbeat says that the step is being computed."""
    link_idle_s: float = 120.0
    """A link between two peers that carried nothing for so long is closed."""
    owner_grace_s: float = 5.0
    """How long a stage outlives its owner's control stream."""
    evictable_after_s: float = 60.0
    """An idle stage may be evicted for a newcomer after this ..."""
    session_idle_s: float = 600.0
    """... and is freed in any case after this. A hop that has no more positions after this is given up, whatever it
    says."""
    dht_s: float = 10.0
    info_s: float = 10.0
    probe_s: float = 10.0
    """A joining peer's layers are probed within this; its answer has to come within half of it."""
    drain_s: float = 30.0


@dataclass(frozen=True, slots=True)
class LimitSettings:
    max_frame_bytes: int = 16 * 1024 * 1024
    max_info_bytes: int = 64 * 1024 * 1024
    """Largest model file (tokenizer) that is taken from a peer."""
    max_streams_per_peer: int = 256
    max_streams: int = 2048
    max_partial_bytes_per_peer: int = 64 * 1024 * 1024
    """Of large frames that have arrived in part, over all streams of one other peer ..."""
    max_partial_bytes: int = 512 * 1024 * 1024
    """... and over all streams."""
    window_frames: int = 8
    """Prefill frames on their way to one stage that has not yet computed them."""
    max_waiting_frames: int = 2 * MOST_WINDOW_FRAMES
    """Frames of one session that wait at one stage."""
    max_delegated: int = 8
    """Generations that a peer owns for thin clients at once."""


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    wait_s: float = 30.0
    """How long a session waits for a replacement when layers are missing, and a thin client for one of its owner."""
    max_rebuilds: int = 64
    """Rebuilds without a single new token between them count; any token starts the count again."""
    max_penalty_s: float = 120.0
    """Longest time that a failing peer is avoided."""


@dataclass(frozen=True, slots=True)
class PlannerSettings:
    hop_s: float = 0.0003
    """One hop's share of framing, scheduling and passing on, beside its link and its layers."""
    hop_margin_s: float = 0.001
    """What a hop more has to gain: figures are never exact, and each hop is one more that can fail."""
    link_s: float = 0.005
    """One way between peers of which nothing was measured."""
    bytes_per_s: float = 12.5e6
    """Of a link whose bandwidth was not measured: 100 Mbit/s."""
    spread: float = 0.03
    """Routes that differ by less than this share count as equal, and each session takes another of them."""


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    kv_tokens: int = 2048
    """Room for so many tokens of KV cache is kept before another layer is taken."""
    settle_s: float = 1.0
    """How long a joining peer looks out for others that join, so that they don't take the same layers."""
    lease_s: float = 120.0
    """A range that a peer is loading counts as served, half as much after this time."""
    gap_drain_s: float = 1.0
    """Sessions don't go on while layers are missing: a peer that moves there waits no longer for them to leave."""
    check_period_s: float = 15.0
    """How often a peer asks itself whether it should move."""
    rebalance_cooldown_s: float = 600.0
    """A peer that has moved stays for so long, except to close a gap."""
    rebalance_threshold: float = 0.08
    """Peers move while the weakest layer has less than the swarm could give by more than this share."""


@dataclass(frozen=True, slots=True)
class PolicySettings:
    min_memory_mb: int = 0
    min_compute_gflops: float = 0.0
    gpu_required: bool = False


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    max_concurrent: int = 64
    """Generations at once; a request with several choices is as many."""
    max_queue: int = 256
    """Requests that wait for their turn; more are refused at once, with 429."""
    queue_wait_s: float = 30.0
    """How long a request waits for its turn before it is refused with 429."""
    max_choices: int = 16
    """Texts that one request may ask for: prompts times ``n``, or ``best_of``."""
    chat_tokens: int = 512
    """What a chat request gets that names no limit, as far as the context has room."""
    max_body_bytes: int = 1024 * 1024
    body_s: float = 20.0
    """For a request's head to arrive, and then for its body."""
    max_connections: int = 512
    max_buffered_tokens: int = 1024
    """Of one text, for a client that reads slowly; then its generation waits ..."""
    slow_reader_s: float = 30.0
    """... and ends after this, as does an answer of which nothing is taken for so long."""
    keep_alive_s: float = 10.0
    """A stream in which nothing is sent for so long gets a comment, lest a proxy on the way take it for dead."""
    watch_events: int = 1024
    """How far a page of the console may be behind before it misses events."""
    kept_traces: int = 64
    """Of the newest generations, for ``/api/traces``."""
    cors_origins: tuple[str, ...] = ()
    """Sites whose pages may use ``/v1`` from a browser (``https://chat.example.org``), or ``*``; the console stays
    closed to them."""
    finish_s: float = 5.0
    """For clients to take the ends of their answers when the gateway ends."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    format: str = "text"
    """text | json: one object a line."""


@dataclass(frozen=True, slots=True)
class Settings:
    model: ModelSettings = field(default_factory=ModelSettings)
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    peer: PeerSettings = field(default_factory=PeerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    discovery: DiscoverySettings = field(default_factory=DiscoverySettings)
    timeouts: TimeoutSettings = field(default_factory=TimeoutSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    planner: PlannerSettings = field(default_factory=PlannerSettings)
    placement: PlacementSettings = field(default_factory=PlacementSettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    log: LogSettings = field(default_factory=LogSettings)
