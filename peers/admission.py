"""This peer's own admission: other peers probe the layers that it serves and vouch for them, or say why not."""

from __future__ import annotations

import asyncio
import logging
import random

from peers.peer import Peer
from peers.probe import obtain_voucher
from peers.reachability import Reachability, find_out
from swarm.dht_time import dht_time
from swarm.errors import NotAdmitted
from swarm.types import LayerRange, PeerAddress, PeerState, Voucher

logger = logging.getLogger(__name__)

PROBE_PAUSE_S = 1.0
"""A peer whose layers were found wrong has them probed once more: verifiers may be wrong, too."""


class Admission:
    """Of ``peer`` with ``layers``."""

    def __init__(self, peer: Peer, layers: LayerRange) -> None:
        self._peer = peer
        self._layers = layers
        self.voucher: Voucher | None = None

    @property
    def alone(self) -> bool:
        """Only we vouch for ourselves."""
        return self.voucher is not None and self.voucher.verifier == self._peer.identity.peer_id

    async def obtain(self) -> Voucher:
        """Have our layers probed; raises :class:`NotAdmitted` if they were found wrong, and again when asked again; by
        more than one peer if we serve already."""
        try:
            self.voucher = await self._probed()
        except NotAdmitted as error:
            logger.warning("probed once more: %s", error)
            await asyncio.sleep(PROBE_PAUSE_S)
            try:
                self.voucher = await self._probed()
            except NotAdmitted as error:
                found = await self.reachability()
                if found.dialled is False:
                    raise NotAdmitted(f"{error.message}; this machine {found.sentence}") from None
                raise
        self._tell_of_clock()
        return self.voucher

    async def _probed(self) -> Voucher:
        peer = self._peer
        await peer.view.refresh()
        known = peer.view.announcements()
        given = peer.transport, known, peer.profile, self._layers, peer.identity, peer.settings
        return await obtain_voucher(*given, serving=self.alone)

    def _tell_of_clock(self) -> None:
        difference = dht_time.difference()
        if difference is not None:
            told = f"our clock is {difference}, whose time is used"
            self._peer.report({"event": "warning", "code": "clock", "message": told})

    async def reachability(self) -> Reachability:
        """As a few serving peers see it."""
        others = self._others()
        random.shuffle(others)
        return await find_out(self._peer.transport, others, self._peer.settings)

    def _others(self) -> list[PeerAddress]:
        serving = (a.peer for a in self._peer.view.announcements() if a.state is PeerState.SERVING)
        return [other for other in serving if other.peer_id != self._peer.identity.peer_id]

    async def tell_reachability(self) -> None:
        """Again, if nobody was there to tell, as soon as somebody is."""
        alone = not self._others()
        found = await self.reachability()
        self._tell(found)
        if alone and found.dialled is None:
            while True:
                await asyncio.sleep(self._peer.settings.discovery.view_period_s)
                if self._others():
                    break
            self._tell(await self.reachability())

    def _tell(self, found: Reachability) -> None:
        self._peer.report({"event": "reachability", "dialled": found.dialled, "message": found.sentence})
