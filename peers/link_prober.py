"""Measures the ways to the peers that a session could go on to from here, and to a few others, for the planners.

What is announced are half round trips, of eight peers at most: whom sessions go on to now, then those that hold the
layer after our last one (round the ring: the first layer), then others, so that everybody's access link is known. A
planner takes the way back to be as long, so two peers need not measure each other. How much a way carries is told by
the frames of prompts and replays that go it (:mod:`peers.line`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import zlib
from collections.abc import Sequence

from peers.links import Links
from swarm.config import Settings
from swarm.errors import SwarmError
from swarm.knowledge import View
from swarm.types import LINK_SUFFIX, Announcement, LayerRange, LinkReport, PeerAddress, PeerId, PeerState

logger = logging.getLogger(__name__)

MOST_REPORTS = 8
FOLLOWERS = 6
"""Of those, at most so many that can follow on us, if there are others as well."""
LOOK_S = 1.0
"""How often the view is searched for newcomers; that costs nothing."""
AGAIN_S = 5.0
"""Newcomers are measured a second time after so long: while they started, their machine was busy."""
AT_ONCE = 4
NEWS_PAUSE_S = 1.0


def worth_measuring(
    own: PeerId, layers: LayerRange, num_layers: int, announcements: Sequence[Announcement]
) -> list[PeerAddress]:
    """At most :data:`MOST_REPORTS` peers that serve, another choice for each ``own`` and the same one every time."""
    following = layers.end % num_layers

    def luck(a: Announcement) -> int:
        return zlib.crc32(f"{own}{a.peer.peer_id}".encode())

    serving = [a for a in announcements if a.state is PeerState.SERVING and a.peer.peer_id != own]
    serving.sort(key=luck)
    followers = [a for a in serving if a.layers.start <= following < a.layers.end]
    others = [a for a in serving if a not in followers]
    chosen = followers[: max(FOLLOWERS, MOST_REPORTS - len(others))]
    return [a.peer for a in [*chosen, *others][:MOST_REPORTS]]


class LinkProber:
    """:meth:`run` until it is cancelled."""

    def __init__(
        self, links: Links, view: View, own: PeerId, layers: LayerRange, num_layers: int, settings: Settings
    ) -> None:
        self.news = asyncio.Event()
        """Set when somebody was measured for the first time: worth an announcement."""
        self._links = links
        self._view = view
        self._own, self._layers, self._num_layers = own, layers, num_layers
        self._settings = settings
        self._due_at: dict[PeerId, float] = {}
        """When each that was measured, or tried in vain, is measured again."""
        self._chosen: list[PeerId] = []

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def wait_for_news(self, at_most_s: float) -> None:
        """Until somebody was measured for the first time and a short pause for more, or until the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await self.news.wait()
                await asyncio.sleep(NEWS_PAUSE_S)
        self.news.clear()

    async def look(self) -> None:
        """Measure those that are new, once more soon after, and then every ``discovery.ping_period_s``."""
        peers = worth_measuring(self._own, self._layers, self._num_layers, self._view.announcements())
        self._chosen = [peer.peer_id for peer in peers]
        self._due_at = {peer: at for peer, at in self._due_at.items() if peer in self._chosen}
        now = asyncio.get_running_loop().time()
        due = [peer for peer in peers if self._due_at.get(peer.peer_id, now) <= now]
        for first in range(0, len(due), AT_ONCE):
            await asyncio.gather(*(self._probe(peer) for peer in due[first : first + AT_ONCE]))

    async def _probe(self, peer: PeerAddress) -> None:
        period_s = self._settings.discovery.ping_period_s
        pause_s = period_s if peer.peer_id in self._due_at else min(AGAIN_S, period_s)
        self._due_at[peer.peer_id] = asyncio.get_running_loop().time() + pause_s
        new = peer.peer_id not in self._links.measured
        try:
            await self._links.probe(peer)
        except SwarmError as error:
            logger.info("the way to %s was not measured: %s", peer.peer_id[-6:], error)
            return
        if new:
            self.news.set()

    def reports(self) -> tuple[LinkReport, ...]:
        """For the announcement: of peers that are there, measured within the time that two periods take."""
        measured, used_at = self._links.measured, self._links.used_at
        now = asyncio.get_running_loop().time()
        oldest = now - 2 * self._settings.discovery.ping_period_s
        present = {a.peer.peer_id for a in self._view.announcements()}
        known = [way for way in measured.items() if way[0] in present and way[1].round_trips and way[1].at >= oldest]
        place = {peer: index for index, peer in enumerate(self._chosen)}
        known.sort(key=lambda way: (-used_at(way[0]), place.get(way[0], MOST_REPORTS)))
        return tuple(
            LinkReport(peer[-LINK_SUFFIX:], way.one_way_s, way.jitter_s, way.told_bytes_per_s(now))
            for peer, way in known[:MOST_REPORTS]
        )
