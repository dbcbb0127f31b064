"""What a planner is asked, what it knows, and what it answers: values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from swarm.config import PlannerSettings
from swarm.link_times import NO_LINKS, Links
from swarm.types import Announcement, Hop, PeerId, Route

_DEFAULTS = PlannerSettings()

Check = Callable[[Announcement], str | None]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a session will ask of a route."""

    tokens: int = 0
    """Positions for which KV room is reserved at each layer; 0: no constraint."""
    prompt_tokens: int = 0
    new_tokens: int = 1
    activation_bytes: int = 0
    """Of one position between two stages: hidden size times the dtype's bytes."""
    log_layers: float = 0.0
    """What the checkpoint log of a position takes, in units of the KV of one layer."""
    chunk_tokens: int = 128
    """Prefill goes in chunks of this size, and stages work on different chunks at once."""


@dataclass(frozen=True, slots=True)
class Knowledge:
    """What a planner knows beside the announcements."""

    links: Links = NO_LINKS
    penalties: Mapping[PeerId, float] = field(default_factory=dict)
    """Seconds a token, of those peers that failed lately; from ``swarm.health``."""
    check: Check = lambda announcement: None
    """The reason for which a peer is not to be used (policy, probe), or ``None``."""
    paces: Mapping[PeerId, float] = field(default_factory=dict)
    """Seconds a layer that sessions measured, which count where the announced ones are a lie; from ``swarm.paces``."""
    age_s: Callable[[PeerId], float] = lambda peer: 0.0
    """Of a peer's announcement."""
    before: PeerId | None = None
    """For a part of the layers: who sends into it ..."""
    after: PeerId | None = None
    """... and who takes from it."""
    hop_s: float = _DEFAULTS.hop_s
    hop_margin_s: float = 0.0
    """Counted for each hop in the choice, and in no prediction."""
    seed: int | None = None
    """Another one for each session spreads the load over equals; ``None``: always the same choice."""
    spread: float = _DEFAULTS.spread


@dataclass(frozen=True, slots=True)
class PlannedHop:
    """A hop with its predicted share of one token's time."""

    hop: Hop
    link_s: float
    """The way to this hop: from the hop before, to the first one from the last."""
    overhead_s: float
    queue_s: float
    compute_s: float
    prefill_s: float
    """Compute for the whole prompt, without waiting for other stages."""

    @property
    def decode_s(self) -> float:
        return self.link_s + self.overhead_s + self.queue_s + self.compute_s


@dataclass(frozen=True, slots=True)
class Plan:
    hops: tuple[PlannedHop, ...]
    cost_s: float
    """Seconds a token with prefill, penalties and unsteady links counted in: what was minimised."""
    decode_s: float
    """Predicted time from token to token."""
    prefill_s: float
    """Predicted time from the prompt to its first token."""
    left_out: tuple[tuple[PeerId, str], ...] = ()
    runners_up: tuple[Plan, ...] = field(default=())

    @property
    def route(self) -> Route:
        """Of a plan for the whole model."""
        return Route(tuple(planned.hop for planned in self.hops))
