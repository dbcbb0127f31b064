"""Reaching the peers that are to run some layers: whoever does not answer at once has rivals.

A peer that lost its power, or its network, still stands in announcements for a while, and a dial to it ends with a
deadline of seconds only; a session that lost a hop would wait for several of them, one after the other. So, like "happy
eyeballs" (RFC 8305), the next best hops are dialled meanwhile, and the first that are complete are taken.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

from swarm.control import HopControl
from swarm.errors import NoRoute, SwarmError, Unreachable
from swarm.types import Hop, PeerId

RIVAL_S = 0.5
"""A peer that is there answers a dial within about four times the way there and back."""

Plan = Callable[[set[PeerId]], Sequence[Hop]]
"""Hops without these peers; raises :class:`NoRoute`."""


class Rivals:
    """Of one range of layers. ``refuse`` is told of each hop that can't be reached; from then on ``plan`` avoids it."""

    def __init__(
        self,
        plan: Plan,
        dial: Callable[[Hop], Awaitable[HopControl]],
        refuse: Callable[[Hop, SwarmError], None],
    ) -> None:
        self._plan, self._dial, self._refuse = plan, dial, refuse
        self._dials: dict[Hop, asyncio.Task[HopControl]] = {}
        self._began: dict[Hop, float] = {}
        self._plans: list[Sequence[Hop]] = []
        """Those that may still come true."""
        self._silent: set[PeerId] = set()

    async def reach(self) -> list[HopControl]:
        """Hops in order, all of them dialled. Raises :class:`NoRoute`."""
        won: list[HopControl] = []
        try:
            won = await self._race()
        finally:
            try:
                await self._end_losers()
            except asyncio.CancelledError:
                for control in won:  # nobody will hear of them
                    control.abort()
                raise
        return won

    async def _end_losers(self) -> None:
        losers = list(self._dials.values())
        for task in losers:
            task.cancel()
        for result in await asyncio.gather(*losers, return_exceptions=True):
            if isinstance(result, HopControl):
                result.abort()

    async def _race(self) -> list[HopControl]:
        rival_at = self._add_plan()
        while True:
            won = next((hops for hops in self._plans if all(self._dials[hop].done() for hop in hops)), None)
            if won is not None:
                self._refuse_slower(max(self._began[hop] for hop in won))
                return [self._dials.pop(hop).result() for hop in won]
            waiting = [self._dials[hop] for hops in self._plans for hop in hops if not self._dials[hop].done()]
            patience_s = None if math.isinf(rival_at) else max(0.0, rival_at - _now())
            done, pending = await asyncio.wait(waiting, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                self._silent |= {hop.peer.peer_id for hop, task in self._dials.items() if task in pending}
            if self._drop_refused() or not done:
                rival_at = self._add_plan()

    def _add_plan(self) -> float:
        """Dials the next best hops; returns when those have waited for long enough."""
        try:
            hops = self._plan(self._silent)
        except NoRoute:
            if self._plans:
                return math.inf
            self._silent.clear()  # some belonged to plans that came to nothing
            hops = self._plan(self._silent)
        self._plans.append(hops)
        for hop in hops:
            if hop not in self._dials:
                self._dials[hop], self._began[hop] = asyncio.ensure_future(self._dial(hop)), _now()
        return _now() + RIVAL_S

    def _refuse_slower(self, than: float) -> None:
        """Those that were dialled before the winners, and still have not answered."""
        for hop, task in self._dials.items():
            if self._began[hop] < than and not task.done():
                self._refuse(hop, Unreachable(f"peer {hop.peer.peer_id} was slower to answer than others"))

    def _drop_refused(self) -> bool:
        """Plans with a hop that can't be reached; whether there are such."""
        refused = [hop for hop, task in self._dials.items() if task.done() and task.exception() is not None]
        for hop in refused:
            error = self._dials.pop(hop).exception()
            if not isinstance(error, SwarmError):
                assert error is not None  # it was asked for a moment ago
                raise error
            self._refuse(hop, error)
        self._plans = [hops for hops in self._plans if not any(hop in refused for hop in hops)]
        return bool(refused)


def _now() -> float:
    return asyncio.get_running_loop().time()
