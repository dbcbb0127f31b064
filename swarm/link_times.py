"""How long the way from one peer to another takes: measured where somebody measured it, estimated elsewhere.

Directed, because uplinks and downlinks differ. A measurement fades: the older it is, the more the estimate counts.
The estimate for a pair that nobody measured is the sum of a height at both ends, as in systems of network coordinates
with a height for the access link (Vivaldi, Dabek et al., SIGCOMM 2004), without the coordinates: a volunteer's access
link is most of the way. Pure: ``now`` is an argument.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from swarm.config import PlannerSettings
from swarm.errors import BadRequest
from swarm.types import LINK_SUFFIX, Announcement, LinkReport, PeerId

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

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
    """0: not known."""

    def __post_init__(self) -> None:
        if not (self.seconds >= 0 and self.jitter_s >= 0 and self.bytes_per_s >= 0):  # NaN, too
            raise BadRequest(f"a link can't take {self.seconds} s with {self.jitter_s} s of jitter")


@dataclass(frozen=True, slots=True)
class Ways:
    """Measurements in columns, one entry for each directed pair, in order of ``source``: a large swarm has 100,000."""

    peers: Sequence[PeerId]
    source: Ints
    """Index into ``peers``."""
    target: Ints
    seconds: Floats
    read: Callable[[int], LinkTime]
    """All that is known of one entry: a plan asks for some hundred."""

    @classmethod
    def of(cls, times: Mapping[tuple[PeerId, PeerId], LinkTime]) -> Ways:
        peers = list(dict.fromkeys(end for pair in times for end in pair))
        at = {peer: index for index, peer in enumerate(peers)}
        pairs = sorted(times, key=lambda pair: at[pair[0]])
        links = [times[pair] for pair in pairs]
        source, target = (np.array([at[pair[end]] for pair in pairs], dtype=np.int64) for end in (0, 1))
        return cls(peers, source, target, np.array([link.seconds for link in links]), links.__getitem__)

    def usual_s(self) -> dict[PeerId, float]:
        """The median of the ways that begin or end at a peer, for each one that has any."""
        order = self.seconds.argsort()
        ends = np.stack([self.source[order], self.target[order]], axis=1).ravel()
        # stable, so that the ways of each end stay in order; NumPy sorts numbers of 16 bits in linear time
        by_end = ends.astype(np.min_scalar_type(len(self.peers))).argsort(kind="stable")
        count = np.bincount(ends, minlength=len(self.peers))
        measured = np.flatnonzero(count)
        count, first = count[measured], (np.cumsum(count) - count)[measured]
        middles = [self.seconds[order[by_end[first + at] // 2]] for at in ((count - 1) // 2, count // 2)]
        usual = (middles[0] + middles[1]) / 2
        return dict(zip([self.peers[index] for index in measured.tolist()], usual.tolist(), strict=True))


class Links:
    """All measurements that a planner knows: ``(from, to) -> LinkTime``. Immutable; read at the moment ``now``."""

    def __init__(
        self,
        times: Mapping[tuple[PeerId, PeerId], LinkTime] | Ways | None = None,
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
        self._ways = times if isinstance(times, Ways) else Ways.of(times or {})
        self._at = {peer: index for index, peer in enumerate(self._ways.peers)}
        self._first = np.searchsorted(self._ways.source, np.arange(len(self._ways.peers) + 1))
        self._from: dict[PeerId, dict[PeerId, LinkTime]] = {}
        """What was asked for already: a plan asks for a hundred peers of ten thousand."""
        self._usual = self._ways.usual_s()
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

    def heights_s(self, peers: Iterable[PeerId]) -> Floats:
        """:meth:`height_s` of each."""
        heights, default_s = self._heights, self._height_s(self.default_s)
        return np.array([heights.get(peer, default_s) for peer in peers])

    def _height_s(self, usual_s: float) -> float:
        return max(usual_s - self.default_s / 2, usual_s / 2)

    def measured_from(self, peer: PeerId) -> Mapping[PeerId, LinkTime]:
        known = self._from.get(peer)
        if known is None:
            known = self._from[peer] = self._read(peer)
        return known

    def _read(self, peer: PeerId) -> dict[PeerId, LinkTime]:
        at, ways = self._at.get(peer), self._ways
        if at is None:
            return {}
        return {
            ways.peers[ways.target[index]]: ways.read(index) for index in range(self._first[at], self._first[at + 1])
        }

    def seconds(self, source: PeerId, target: PeerId) -> float:
        """Expected time of a small message; nothing within one peer."""
        if source == target:
            return 0.0
        guess = self.height_s(source) + self.height_s(target)
        link = self.measured_from(source).get(target)
        return guess if link is None else guess + self._weight(link) * (link.seconds - guess)

    def risk_s(self, source: PeerId, target: PeerId) -> float:
        """What the planner adds for unsteadiness; no part of a prediction."""
        link = self.measured_from(source).get(target)
        return 0.0 if link is None else JITTER_SHARE * self._weight(link) * link.jitter_s

    def bytes_per_s(self, source: PeerId, target: PeerId) -> float:
        link = self.measured_from(source).get(target)
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
        everything = self._everything()
        out = {(copy, target): link for (source, target), link in everything.items() if source == peer}
        back = {(source, copy): link for (source, target), link in everything.items() if target == peer}
        return self._with(out | back)

    def _everything(self) -> dict[tuple[PeerId, PeerId], LinkTime]:
        peers = self._ways.peers
        return {(peer, other): link for peer in peers for other, link in self.measured_from(peer).items()}

    def _with(self, more: Mapping[tuple[PeerId, PeerId], LinkTime]) -> Links:
        half_life_s, bytes_per_s = self._half_life_s, self.default_bytes_per_s
        everything = self._everything() | dict(more)
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
    peers: list[PeerId] = []
    known: dict[str, int] = {}
    reports: list[LinkReport] = []
    counts: list[int] = []
    measured_at: list[float] = []
    for index, a in enumerate(announcements):
        peer = a.peer.peer_id
        end = peer[-LINK_SUFFIX:]
        known[end] = -1 if end in known else index
        peers.append(peer)
        counts.append(len(a.links))
        measured_at.append(-age_s(peer) if a.links else 0.0)
        reports += a.links
    reporter = source = np.repeat(np.arange(len(peers)), counts)
    target = np.array([known.get(report.peer, -1) for report in reports], dtype=np.int64)
    seconds = np.array([report.seconds for report in reports])
    kept = np.flatnonzero((target >= 0) & (target != source))[::-1]  # of two reports about the same, the last counts
    source, target = source[kept], target[kept]
    # one number to sort by: from, to, and then a reported way comes before a mirrored one
    count, places = len(peers), max(1, 2 * len(kept))
    ways = np.concatenate([source * count + target, target * count + source]) * places + np.arange(2 * len(kept))
    ways.sort()
    pairs, place = np.divmod(ways, places)
    first = np.flatnonzero(np.diff(pairs, prepend=-1))
    chosen, there = kept[place[first] % max(1, len(kept))], place[first] < len(kept)
    sources, targets = np.divmod(pairs[first], max(1, count))

    def read(index: int) -> LinkTime:
        report = reports[chosen[index]]
        bytes_per_s = report.bytes_per_s if there[index] else 0.0  # a home's line carries less one way than the other
        return LinkTime(report.seconds, report.jitter_s, measured_at[reporter[chosen[index]]], bytes_per_s)

    return Links(Ways(peers, sources, targets, seconds[chosen], read), default_s=default_s, bytes_per_s=bytes_per_s)
