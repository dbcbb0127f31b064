"""Where the time of a generation went, hop by hop, beside what had been predicted. Pure.

The same record serves ``swarm why``, the console's timeline and exports.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from swarm.errors import BadRequest
from swarm.plans import PlannedHop
from swarm.types import Hop, HopTiming, LayerRange, PeerAddress, PeerId, Route

MAX_TOKENS = 4096
"""A trace keeps the newest tokens only."""


@dataclass(frozen=True, slots=True)
class TracedToken:
    index: int
    gap_s: float
    """Since the token before, or for the first one since the request."""
    hops: tuple[HopTiming, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    model: str
    prompt_tokens: int
    tokens: tuple[TracedToken, ...]
    predicted: tuple[PlannedHop, ...] = ()
    """For the route that was taken at last; empty if nobody predicted."""

    @property
    def route(self) -> Route:
        """The last one; raises :class:`BadRequest` if no token's hops are known."""
        return Route(tuple(Hop(PeerAddress(hop.peer_id), hop.layers) for hop in self.last_hops))

    @property
    def last_hops(self) -> tuple[HopTiming, ...]:
        """Of the newest pass: tokens of a draft come without any."""
        return next((token.hops for token in reversed(self.tokens) if token.hops), ())

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Trace:
        """Raises :class:`BadRequest` for anything that :meth:`to_json` didn't write."""
        try:
            raw = json.loads(text)
            return cls(
                model=raw["model"],
                prompt_tokens=raw["prompt_tokens"],
                tokens=tuple(
                    TracedToken(token["index"], token["gap_s"], tuple(_timing(hop) for hop in token["hops"]))
                    for token in raw["tokens"]
                ),
                predicted=tuple(_planned(hop) for hop in raw["predicted"]),
            )
        except (ValueError, KeyError, TypeError):
            exported = ", but one exported for ui.perfetto.dev" if '"traceEvents"' in text else ""
            raise BadRequest(f"this is no trace as swarm generate --trace FILE writes it{exported}") from None


def _timing(raw: dict[str, object]) -> HopTiming:
    return HopTiming(**{**raw, "layers": LayerRange(**raw["layers"])})  # type: ignore[arg-type]


def _planned(raw: dict[str, object]) -> PlannedHop:
    hop = raw["hop"]
    peer = PeerAddress(PeerId(hop["peer"]["peer_id"]), tuple(hop["peer"]["multiaddrs"]))  # type: ignore[index]
    return PlannedHop(**{**raw, "hop": Hop(peer, LayerRange(**hop["layers"]))})  # type: ignore[arg-type,index]


@dataclass(frozen=True, slots=True)
class HopShare:
    """Medians over the decoded tokens, in seconds."""

    peer_id: PeerId
    layers: LayerRange
    queue_s: float
    compute_s: float
    link_s: float
    """One way to the next hop, by measured round trips; 0: not measured."""
    batch: float
    predicted: PlannedHop | None
    predicted_link_s: float | None = None
    """One way to the next hop, as it had been announced."""


@dataclass(frozen=True, slots=True)
class Why:
    """The answer of ``swarm why``."""

    hops: tuple[HopShare, ...]
    measured_s: float
    """From token to token, median."""
    predicted_s: float | None
    predicted_elsewhere_s: float | None
    elsewhere_s: float
    """What neither queues, nor layers, nor measured links explain: serialising, scheduling, waiting."""
    dominant: str


def explain(trace: Trace) -> Why:
    """Raises :class:`BadRequest` if the trace has no decoded token with hop times."""
    # Tokens that were guessed right came with the one before them, and have no hop times of their own.
    route = trace.last_hops
    where = [(hop.peer_id, hop.layers) for hop in route]
    same = [t for t in trace.tokens[1:] if [(h.peer_id, h.layers) for h in t.hops] == where]
    if not where or not same:
        raise BadRequest("the generation has no second token with hop times; generate a longer one")
    planned = {(p.hop.peer.peer_id, p.hop.layers): p for p in trace.predicted}
    shares = tuple(
        HopShare(
            peer_id=peer_id,
            layers=layers,
            queue_s=statistics.median(t.hops[i].queue_s for t in same),
            compute_s=statistics.median(t.hops[i].compute_s for t in same),
            link_s=statistics.median(t.hops[i].link_s for t in same),
            batch=statistics.median(t.hops[i].batch for t in same),
            predicted=planned.get((peer_id, layers)),
            predicted_link_s=following.link_s if (following := planned.get(where[(i + 1) % len(where)])) else None,
        )
        for i, (peer_id, layers) in enumerate(where)
    )
    measured = statistics.median(token.gap_s for token in same)
    explained = sum(share.queue_s + share.compute_s + share.link_s for share in shares)
    predicted = [share.predicted for share in shares]
    return Why(
        hops=shares,
        measured_s=measured,
        predicted_s=sum(p.decode_s for p in predicted if p) if all(predicted) else None,
        predicted_elsewhere_s=sum(p.overhead_s for p in predicted if p) if all(predicted) else None,
        elsewhere_s=max(0.0, measured - explained),
        dominant=_dominant(shares, max(0.0, measured - explained)),
    )


def _dominant(shares: Sequence[HopShare], elsewhere_s: float) -> str:
    parts = [(elsewhere_s, "wire and waiting beside the measured links")]
    for number, share in enumerate(shares):
        name = f"hop {number} ({share.peer_id[-6:]})"
        following = shares[(number + 1) % len(shares)].peer_id[-6:]
        parts += [
            (share.compute_s, f"the layers of {name}"),
            (share.queue_s, f"the queue of {name}"),
            (share.link_s, f"the link from {share.peer_id[-6:]} to {following}"),
        ]
    return max(parts)[1]
