"""What of a model is served, what is missing, and what would help: in the same words everywhere. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.config import ModelSettings
from swarm.errors import NoRoute
from swarm.types import Announcement, LayerRange, PeerState

if TYPE_CHECKING:
    from swarm.models import ModelProfile
    from swarm.plans import Check

MB = 1_000_000
REFERENCE = "REF"
"""Stands for what ``--model`` is to be given; it names no model."""


def missing_layers(served: Iterable[LayerRange], wanted: LayerRange) -> list[LayerRange]:
    """The parts of ``wanted`` that none of ``served`` covers, in order."""
    gaps: list[LayerRange] = []
    reached = wanted.start
    for layers in sorted(served):
        if layers.start > reached and reached < wanted.end:
            gaps.append(LayerRange(reached, min(layers.start, wanted.end)))
        reached = max(reached, layers.end)
    if reached < wanted.end:
        gaps.append(LayerRange(reached, wanted.end))
    return gaps


def nobody_serves(gaps: Sequence[LayerRange]) -> str:
    """The sentence of every report and refusal: ``nobody serves layers 4:8, 20:30``."""
    return f"nobody serves layers {listed(gaps)}"


def listed(gaps: Sequence[LayerRange]) -> str:
    return ", ".join(map(str, gaps))


def weights_bytes(profile: ModelProfile, layers: LayerRange) -> int:
    """Weights of a peer with ``layers``: embedding and head where held, a tied table once."""
    first, last = layers.start == 0, layers.end == profile.num_layers
    size = len(layers) * profile.layer_bytes
    if first:
        size += profile.embedding_bytes
    if last:
        size += profile.head_bytes
    if first and last and profile.tied:
        size -= profile.embedding_bytes
    return size


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often each layer is served, and what is missing."""

    counts: tuple[int, ...]
    """Peers for each layer."""
    missing: tuple[LayerRange, ...]
    missing_bytes: int
    """Weights that nobody holds; a peer needs room for KV caches on top."""
    peers: int
    flags: str = ""
    """Without these a peer would serve another model, or other weights, which are one."""
    name: str = ""
    """Of the model, if ``flags`` leave open where a peer has it: only its own machine knows the folder or file."""

    @property
    def complete(self) -> bool:
        return not self.missing

    def sentence(self) -> str:
        if self.complete:
            by = f"each by {min(self.counts)} or more of {self.peers} peers" if self.peers > 1 else "by 1 peer"
            return f"all {len(self.counts)} layers are served, {by}"
        return f"{nobody_serves(self.missing)}: {self.remedy()}"

    def remedy(self) -> str:
        """How much is missing and what would help; only while something is missing."""
        most = max(self.missing, key=len)
        where = f" ({REFERENCE}: the folder, .gguf file or Hub id of {self.name})" if self.name else ""
        return (
            f"{sum(map(len, self.missing))} of {len(self.counts)} layers, "
            f"{-(-self.missing_bytes // MB)} MB of weights; a peer started with {self.flags}--layers {most}, or with "
            f"{self.flags}--layers auto, would help{where}"
        )


def coverage_of(served: Sequence[LayerRange], profile: ModelProfile) -> Coverage:
    counts = [0] * profile.num_layers
    for layers in served:
        for layer in range(layers.start, min(layers.end, profile.num_layers)):
            counts[layer] += 1
    gaps = missing_layers(served, LayerRange(0, profile.num_layers))
    missing_bytes = sum(weights_bytes(profile, gap) for gap in gaps)
    default = ModelSettings()
    other = profile.name != default.name
    model = f"--model {REFERENCE} " if other else ""
    dtype = f"--dtype {profile.dtype} " if profile.dtype != default.dtype else ""
    weights = f"--weights {profile.weights} " if profile.weights != default.weights else ""
    name = profile.name if other else ""
    return Coverage(tuple(counts), tuple(gaps), missing_bytes, len(served), model + dtype + weights, name)


def served(announcements: Iterable[Announcement], profile: ModelProfile, check: Check) -> Coverage:
    """By those whom a planner would use: ``check`` is that of ``swarm.plans.Knowledge``."""
    serving = [a.layers for a in announcements if a.state is PeerState.SERVING and check(a) is None]
    return coverage_of(serving, profile)


def explained(error: NoRoute, announcements: Iterable[Announcement], profile: ModelProfile, check: Check) -> NoRoute:
    """The planner's refusal; if layers are missing, with how much that is and what would help."""
    coverage = served(announcements, profile, check)
    return error if coverage.complete else NoRoute(f"{error.message}: {coverage.remedy()}")
