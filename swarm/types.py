"""Frozen value types that every module shares. They check themselves and raise our own errors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from swarm.errors import BadRequest, WrongRange

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58, for example ``12D3KooW...``."""

SessionId = NewType("SessionId", str)
"""32 hexadecimal digits, drawn by the session's owner."""

ModelId = NewType("ModelId", str)
"""Name and fingerprint of exact weights: ``name@16 hexadecimal digits``."""

_RANGE = re.compile(r"^(\d{1,6}):(\d{1,6})$")


@dataclass(frozen=True, slots=True, order=True)
class LayerRange:
    """Decoder layers ``start .. end - 1``, half open, counted from 0."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise WrongRange(f"layer range {self.start}:{self.end} is empty or negative")

    @classmethod
    def parse(cls, text: str) -> LayerRange:
        """``"10:20"`` -> ``LayerRange(10, 20)``; raises :class:`WrongRange`."""
        match = _RANGE.match(text.strip())
        if match is None:
            raise WrongRange(f"{text!r} is no layer range; write START:END, for example 0:10")
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def covers(self, other: LayerRange) -> bool:
        return self.start <= other.start and other.end <= self.end


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Who a peer is and where to dial it; no multiaddrs means: the daemon already knows the way."""

    peer_id: PeerId
    multiaddrs: tuple[str, ...] = ()

    @property
    def relayed(self) -> bool:
        """Whether it lets itself be dialled through a relay, because others can't reach it directly."""
        return any("/p2p-circuit" in address for address in self.multiaddrs)


class PeerState(StrEnum):
    JOINING = "joining"
    SERVING = "serving"
    DRAINING = "draining"
    LEFT = "left"
    """A tombstone: the peer said goodbye; kept on the DHT until its last announcement would have expired."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many layers fit a peer's memory beside its KV room: fewer with the tables that an end of the model needs."""

    middle: int
    """Layers that include neither the first nor the last."""
    first: int
    """Layers from 0 on, with the embedding."""
    last: int
    """Layers up to the last one, with the head."""
    whole: bool = False
    """All of the model."""

    def __post_init__(self) -> None:
        if min(self.middle, self.first, self.last) < 0:
            raise WrongRange(f"a capacity can't be negative: {self.middle}, {self.first}, {self.last}")

    def end_from(self, start: int, num_layers: int) -> int:
        """Where the longest range from ``start`` ends; ``start`` itself if not one layer fits there."""
        if start == 0:
            return num_layers if self.whole else min(self.first, num_layers - 1)
        return num_layers if num_layers - start <= self.last else min(start + self.middle, num_layers - 1)

    def fits(self, layers: LayerRange, num_layers: int) -> bool:
        return layers.end <= self.end_from(layers.start, num_layers)


@dataclass(frozen=True, slots=True)
class Voucher:
    """A peer's word that it probed the layers of an announcement and found them right; see ``swarm.admission``."""

    verifier: PeerId
    """The announcing peer itself, if nobody else was there to ask."""
    at: float
    """Unix time by the verifier's clock."""
    signature: bytes


@dataclass(frozen=True, slots=True)
class LinkReport:
    """What a peer measured of the way to another one."""

    peer: str
    """The end of the other's peer id, :data:`LINK_SUFFIX` characters."""
    seconds: float
    """One way: half of a round trip."""
    jitter_s: float
    """Mean deviation."""
    bytes_per_s: float = 0.0
    """There, not back; 0: not known to be slow."""


LINK_SUFFIX = 8
"""Characters of a peer id that tell it from the others of a swarm: 58**8 are many."""
MAX_LIFETIME_S = 120.0
"""Of an announcement: nobody can keep that of a dead peer for longer."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a peer says of itself on the DHT, signed with its identity key."""

    peer: PeerAddress
    model: ModelId
    layers: LayerRange
    state: PeerState
    version: str
    decode_s_per_layer: float
    """Seconds for one token through one layer, measured; the planner multiplies by the layers used."""
    prefill_s_per_token_layer: float
    """Seconds for each token of a long prompt through one layer."""
    kv_tokens_free: int
    """Tokens that the peer could still take into KV caches, over all its layers."""
    queue_s: float = 0.0
    """How long new work waits before it is computed, recent average."""
    sessions: int = 0
    sent_at: float = 0.0
    """Unix time by the peer's own clock; only differences from the same peer mean anything."""
    lifetime_s: float = MAX_LIFETIME_S
    """From ``sent_at`` to the end of its record on the DHT."""
    capacity: Capacity | None = None
    """For others, who reckon with where this peer could move."""
    moving_to: LayerRange | None = None
    """The range that it is loading: a lease. A joining peer without one has not decided yet."""
    memory_mb: int = 0
    """What it gives, and two more facts for a swarm's policy."""
    gflops: float = 0.0
    gpu: bool = False
    step_s: float = 0.0
    """What one step takes at this peer beside its layers, however many they are."""
    head_s: float = 0.0
    """... and what the final norm, the head and sampling add, where the last layer is held."""
    links: tuple[LinkReport, ...] = ()
    """Ways to other peers, the most useful ones first."""
    voucher: Voucher | None = None
    """For ``layers``; without one the peer is not used."""

    def token_s(self, layers: LayerRange) -> float:
        """One token through ``layers``, with all that a step takes beside them."""
        head_s = self.head_s if layers.end == self.layers.end else 0.0
        return self.step_s + self.decode_s_per_layer * len(layers) + head_s


@dataclass(frozen=True, slots=True)
class Hop:
    """One peer with the sub-range of its layers that it is to run."""

    peer: PeerAddress
    layers: LayerRange


@dataclass(frozen=True, slots=True)
class Route:
    """Hops that cover layers ``0:L`` in order, each layer once."""

    hops: tuple[Hop, ...]

    def __post_init__(self) -> None:
        if not self.hops:
            raise BadRequest("a route needs at least one hop")
        if self.hops[0].layers.start != 0:
            raise BadRequest(f"a route starts at layer 0, not {self.hops[0].layers.start}")
        for left, right in zip(self.hops, self.hops[1:], strict=False):
            if left.layers.end != right.layers.start:
                raise BadRequest(f"hops {left.layers} and {right.layers} don't meet")

    def __str__(self) -> str:
        return " > ".join(f"{hop.peer.peer_id[-6:]}[{hop.layers}]" for hop in self.hops)


@dataclass(frozen=True, slots=True)
class HopTiming:
    """Where one token's time went at one hop, in seconds by that hop's own clock."""

    peer_id: PeerId
    layers: LayerRange
    queue_s: float
    compute_s: float
    batch: int
    """Sessions that were computed in the same step."""
    link_s: float = 0.0
    """One way to the next hop, half of a measured round trip; 0: not measured yet."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, as the owner received it."""

    index: int
    """0 for the first generated token."""
    token_id: int
    text: str
    """What this token adds to the text; empty while a multi-byte character is incomplete."""
    hops: tuple[HopTiming, ...] = field(default=())
    logprob: float | None = None
    """Natural logarithm of its probability by the model alone, if asked for (``SamplingParams.logprobs``)."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The likeliest token ids in its place, with theirs."""
