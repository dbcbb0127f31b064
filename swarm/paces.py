"""What sessions have measured of peers that promise more than they give. Pure.

A peer announces its own speed; the time that its steps take in a session is the better witness where it is worse.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from swarm.types import Announcement, HopTiming, PeerId

SMOOTHING = 0.2
"""Weight of the newest step in a peer's measured time per layer."""
ENOUGH = 4
"""Steps before a measurement counts."""
BELIEVED_S = 600.0
"""After its last step a measurement counts for so long: the peer may have had a bad moment."""
BROKEN_PROMISE = 1.5
"""An announced time per layer stands unless steps take so many times longer: they vary."""


@dataclass(frozen=True, slots=True)
class Pace:
    layer_s: float
    steps: int
    at: float


class Paces:
    """Of all peers that this process had sessions with."""

    def __init__(self) -> None:
        self._paces: dict[PeerId, Pace] = {}

    def note(self, promised: Announcement, timing: HopTiming, now: float) -> None:
        """A step of one row at a peer; one that was computed together with other sessions' tells nothing."""
        if timing.batch != 1:
            return
        beside_s = promised.step_s + (promised.head_s if timing.layers.end == promised.layers.end else 0.0)
        layer_s = max(0.0, timing.compute_s - beside_s) / len(timing.layers)
        known = self._paces.get(timing.peer_id)
        if known is None or now - known.at > BELIEVED_S:
            self._paces = self._believed(now) | {timing.peer_id: Pace(layer_s, 1, now)}
        else:
            smooth_s = known.layer_s + SMOOTHING * (layer_s - known.layer_s)
            self._paces[timing.peer_id] = Pace(smooth_s, known.steps + 1, now)

    def measured_s(self, now: float) -> dict[PeerId, float]:
        """Seconds a layer, of those peers of which enough is known and not too old."""
        return {peer: pace.layer_s for peer, pace in self._believed(now).items() if pace.steps >= ENOUGH}

    def _believed(self, now: float) -> dict[PeerId, Pace]:
        return {peer: pace for peer, pace in self._paces.items() if now - pace.at <= BELIEVED_S}


def as_measured(announcement: Announcement, layer_s: float | None) -> Announcement:
    """As announced, or with the measured time per layer (``None``: not measured) if that breaks the promise."""
    if layer_s is None or layer_s <= BROKEN_PROMISE * announcement.decode_s_per_layer:
        return announcement
    return replace(announcement, decode_s_per_layer=layer_s)
