"""How long the way from one peer to another takes: measured where somebody measured it, estimated elsewhere.

Directed, because uplinks and downlinks differ. A measurement fades: the older it is, the more the estimate counts.
The estimate for a pair that nobody measured is the sum of a height at both ends, as in systems of network coordinates
with a height for the access link (Vivaldi, Dabek et al., SIGCOMM 2004), without the coordinates: a volunteer's access
link is most of the way. Pure: ``now`` is an argument.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from swarm.config import PlannerSettings
from swarm.errors import BadRequest
from swarm.types import LINK_SUFFIX, Announcement, PeerId

_DEFAULTS = PlannerSettings()
HALF_LIFE_S = 300.0
"""A measurement of this age counts half, the estimate the other half."""
JITTER_SHARE = 0.5
"""How much of a link's jitter is counted as time: of two links with one mean, the steady one is preferred."""


@dataclass(frozen=True, slots=True)
class LinkTime:
    """One measurement."""

    seconds: float
    """One way: half a round trip where nothing better is known."""
    jitter_s: float = 0.0
    """Mean deviation."""
    measured_at: float = 0.0
    """By the clock that gives ``now`` to :class:`Links`."""
    bytes_per_s: float = 0.0
    """0: not measured."""

    def __post_init__(self) -> None:
        if not (self.seconds >= 0 and self.jitter_s >= 0 and self.bytes_per_s >= 0):  # NaN, too
            raise BadRequest(f"a link can't take {self.seconds} s with {self.jitter_s} s of jitter")


class Links:
    """All measurements that a planner knows: ``(from, to) -> LinkTime``. Immutable; read at the moment ``now``."""

    def __init__(
        self,
        times: Mapping[tuple[PeerId, PeerId], LinkTime] | None = None,
        now: float = 0.0,
        *,
        default_s: float = _DEFAULTS.link_s,
        half_life_s: float = HALF_LIFE_S,
        bytes_per_s: float = _DEFAULTS.bytes_per_s,
    ) -> None:
        self.default_s = default_s
        self.default_bytes_per_s = bytes_per_s
        self._now = now
        self._half_life_s = half_life_s
        self._from: dict[PeerId, dict[PeerId, LinkTime]] = {}
        touching: dict[PeerId, list[float]] = {}
        for (source, target), link in (times or {}).items():
            self._from.setdefault(source, {})[target] = link
            touching.setdefault(source, []).append(link.seconds)
            touching.setdefault(target, []).append(link.seconds)
        self._usual = {peer: statistics.median(seconds) for peer, seconds in touching.items()}
        if self._usual:
            self.default_s = statistics.median(self._usual.values())
        self._heights = {peer: self._height_s(usual_s) for peer, usual_s in self._usual.items()}

    def usual_s(self, peer: PeerId) -> float:
        """What links of this peer usually take, one way."""
        return self._usual.get(peer, self.default_s)

    def height_s(self, peer: PeerId) -> float:
        """This end's share of a way that nobody measured: half of it between usual peers, most of a slow one's."""
        height_s = self._heights.get(peer)
        return self._height_s(self.default_s) if height_s is None else height_s

    def _height_s(self, usual_s: float) -> float:
        return max(usual_s - self.default_s / 2, usual_s / 2)

    def measured_from(self, peer: PeerId) -> Mapping[PeerId, LinkTime]:
        return self._from.get(peer, {})

    def seconds(self, source: PeerId, target: PeerId) -> float:
        """Expected time of a small message; nothing within one peer."""
        if source == target:
            return 0.0
        guess = self.height_s(source) + self.height_s(target)
        link = self._from.get(source, {}).get(target)
        return guess if link is None else guess + self._weight(link) * (link.seconds - guess)

    def risk_s(self, source: PeerId, target: PeerId) -> float:
        """What the planner adds for unsteadiness; no part of a prediction."""
        link = self._from.get(source, {}).get(target)
        return 0.0 if link is None else JITTER_SHARE * self._weight(link) * link.jitter_s

    def bytes_per_s(self, source: PeerId, target: PeerId) -> float:
        link = self._from.get(source, {}).get(target)
        return link.bytes_per_s if link is not None and link.bytes_per_s > 0 else self.default_bytes_per_s

    def _weight(self, link: LinkTime) -> float:
        age_s = max(0.0, self._now - link.measured_at)
        return float(0.5 ** (age_s / self._half_life_s))

    def with_links(self, peer: PeerId, others: Iterable[PeerId], seconds: float) -> Links:
        """As if ``peer`` had been measured just now: ``seconds`` to and from each of ``others``."""
        link = LinkTime(seconds, measured_at=self._now)
        ways = [way for other in others for way in ((peer, other), (other, peer))]
        return self._with(dict.fromkeys(ways, link))

    def with_copy(self, peer: PeerId, copy: PeerId) -> Links:
        """``copy`` has the same links as ``peer``, and a usual one to it."""
        out = {(copy, target): link for target, link in self._from.get(peer, {}).items()}
        back = {(source, copy): links[peer] for source, links in self._from.items() if peer in links}
        return self._with(out | back)

    def _with(self, more: Mapping[tuple[PeerId, PeerId], LinkTime]) -> Links:
        times = {(source, target): link for source, links in self._from.items() for target, link in links.items()}
        half_life_s, bytes_per_s = self._half_life_s, self.default_bytes_per_s
        everything = times | dict(more)
        return Links(everything, self._now, default_s=self.default_s, half_life_s=half_life_s, bytes_per_s=bytes_per_s)


NO_LINKS = Links()


def links_of(
    announcements: Iterable[Announcement],
    age_s: Callable[[PeerId], float] = lambda peer: 0.0,
    *,
    default_s: float = _DEFAULTS.link_s,
    bytes_per_s: float = _DEFAULTS.bytes_per_s,
) -> Links:
    """What the peers themselves announce; where one end alone has measured, the way back takes as long.

    A report about somebody who isn't announced, or whose id can't be told from another's, counts for nothing.
    """
    known: dict[str, PeerId | None] = {}
    reporting: list[Announcement] = []
    for a in announcements:
        end = a.peer.peer_id[-LINK_SUFFIX:]
        known[end] = None if end in known else a.peer.peer_id
        if a.links:
            reporting.append(a)
    times: dict[tuple[PeerId, PeerId], LinkTime] = {}
    for a in reporting:
        source = a.peer.peer_id
        for report in a.links:
            target = known.get(report.peer)
            if target is not None and target != source:
                times[source, target] = LinkTime(report.seconds, report.jitter_s, -age_s(source))
    for (source, target), link in list(times.items()):
        times.setdefault((target, source), link)
    return Links(times, default_s=default_s, bytes_per_s=bytes_per_s)
