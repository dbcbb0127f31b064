"""Make before break: a peer that says goodbye is replaced before it goes.

The successors (one, or several for one leaving range) are opened in an epoch of their own and follow the hop
upstream as a second target, from its checkpoint log at first and then live, while the old route goes on
producing tokens. When they have caught up, the route is established anew with them in the old one's place,
between two tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from swarm.awake import Standstills
from swarm.control import HopControl
from swarm.errors import NoRoute, PeerLost, SwarmError
from swarm.types import Hop, PeerId

if TYPE_CHECKING:
    from swarm.chain import Chain

logger = logging.getLogger(__name__)

POLL_S = 0.005
"""Between two looks at how far the successors have come: at least this, at most ten times as much."""

LAG = 16
"""Positions that the successors may still lack when they are taken: they run so few in one pass. Where others use them,
too, or the way to them is long, the newest position is never there while the old route goes on.
"""


class Handover:
    """From one ``leaving`` hop to ``fresh`` ones. They belong to the handover until :meth:`take`."""

    def __init__(self, chain: Chain, leaving: HopControl, token_s: float) -> None:
        """``token_s``: measured time between tokens, which sets how often to look."""
        self.leaving = leaving
        self.fresh: list[HopControl] = []
        self._chain = chain
        self._refused: dict[PeerId, SwarmError] = {leaving.hop.peer.peer_id: PeerLost("leaving")}
        self._poll_s = min(max(token_s / 4, POLL_S), 10 * POLL_S)

    async def run(self) -> None:
        """Until the successors are warm, or the handover is cancelled; a failed attempt is followed by another."""
        chain, leaver = self._chain, self.leaving.hop.peer.peer_id
        while True:
            try:
                with Standstills(self._excuse):
                    async with asyncio.timeout(chain.settings.timeouts.drain_s):
                        await self._open()
                        await self._catch_up()
                chain.events.put(self.leaving, self)
                return
            except NoRoute as error:
                logger.info("no successor for %s yet: %s", leaver[-6:], error)
                self.abort()  # a peer may say so, too
                self._refused = {leaver: self._refused[leaver]}
                await asyncio.sleep(chain.settings.timeouts.heartbeat_s)
                await chain.planner.refresh()
            except (SwarmError, TimeoutError) as error:
                logger.info("a successor for %s failed: %s", leaver[-6:], error)
                self.abort()
                await asyncio.sleep(self._poll_s)

    async def _open(self) -> None:
        chain, leaving = self._chain, self.leaving
        for hop in chain.planner.plan(leaving.hop.layers, self._refused, chain.hops):
            with self._refusing(hop):
                self.fresh.append(await chain.dial(hop))
        epoch, index = chain.next_epoch(), chain.controls.index(leaving)
        before = chain.controls[index - 1]
        keep = min(chain.transcript.kept, chain.transcript.unchanged)
        for control, previous in zip(self.fresh, [before, *self.fresh], strict=False):
            with self._refusing(control.hop):
                await control.open(chain.opener.message(control.hop, previous.hop, epoch, keep))
        for control, following in itertools.pairwise(self.fresh):
            await control.start(epoch, [chain.opener.target(following, following.have, epoch)])
        await self.fresh[-1].start(epoch, [])  # in step mode the last stage waits to be told
        first = self.fresh[0]
        self._epoch, self._fed = epoch, first.have if index == 0 else None
        if index > 0:
            present = [target for target in before.targets if target.epoch == chain.epoch]
            await before.start(chain.epoch, [*present, chain.opener.target(first, first.have, epoch)])

    def _excuse(self, stood_s: float) -> None:
        """This process stood still for so long: nobody was silent meanwhile."""
        for control in self.fresh:
            control.last_heard += stood_s

    async def _catch_up(self) -> None:
        """Until the last of them lacks hardly more than the newest position."""
        transcript, last = self._chain.transcript, self.fresh[-1]
        tokens = transcript.tokens
        proven = last.have + 1  # then it has computed something, and whoever sends to it has reached it
        while last.have < min(len(tokens) - 1, max(proven, len(tokens) - 1 - LAG)):
            if self._fed is not None and self._fed < len(tokens):
                self._fed, start = len(tokens), self._fed
                await self.fresh[0].input(self._epoch, start, tokens[start:], transcript.step)
            await asyncio.sleep(self._poll_s)
            for control in self.fresh:
                with self._refusing(control.hop):
                    control.check_heard()
                    await control.ping()

    @contextlib.contextmanager
    def _refusing(self, hop: Hop) -> Iterator[None]:
        """A peer that can't be reached or says no is blamed, and not asked again while there are others."""
        try:
            yield
        except SwarmError as error:
            self._refused[hop.peer.peer_id] = error
            self._chain.planner.blame(hop, error)
            raise

    def take(self) -> list[HopControl]:
        """The warm successors; they are the caller's now."""
        fresh, self.fresh = self.fresh, []
        return fresh

    def abort(self) -> None:
        for control in self.take():
            control.abort()
