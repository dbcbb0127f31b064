"""What the console's pages show of the swarm, rendered; looked up anew only while somebody watches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from swarm.commands.status import STALE_S, Status, status_of
from swarm.errors import SwarmError
from swarm.gateway.answers import STILL_HERE
from swarm.gateway.console_events import sse
from swarm.gateway.console_map import SwarmMap, swarm_map
from swarm.gateway.state import GatewayState
from swarm.models import BUILT_IN, resolve
from swarm.types import Announcement, PeerState

REFRESH_S = 2.0
"""The swarm view is read from the DHT at most this often for all watchers together."""
TICK_S = 0.5
"""How often a page is brought up to date."""
MAX_JOIN_ADDRESSES = 4


class Live:
    """One for each gateway."""

    def __init__(self, state: GatewayState) -> None:
        self._state = state
        self._lock = asyncio.Lock()
        self._jinja = Environment(
            loader=PackageLoader("swarm.gateway"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._jinja.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]

    def render(self, template: str, **values: Any) -> str:
        return self._jinja.get_template(template).render(values)

    async def status(self) -> Status:
        """As known now; if nobody has looked for a while, it is looked up first."""
        view = self._state.client.view
        async with self._lock:
            if view.since_look() > REFRESH_S:
                await view.refresh()
        profile, gone = self._state.client.profile, self._state.local_peers.gone()
        there = [a for a in view.announcements() if a.peer.peer_id not in gone]
        return status_of(profile, [(a, view.age(a.peer.peer_id)) for a in there], view.check)

    async def map(self) -> SwarmMap:
        return swarm_map(await self.status(), self._state.local_peers.names())

    def join_addresses(self) -> list[str]:
        """By which another machine or peer can join: of live peers, one each; those first that others can dial.

        In an order that stays from one announcement to the next: people copy from it.
        """
        view, gone = self._state.client.view, self._state.local_peers.gone()

        def rank(a: Announcement) -> tuple[bool, bool, str]:
            return a.peer.relayed, view.age(a.peer.peer_id) > STALE_S, a.peer.peer_id

        found = [
            a.peer.multiaddrs[0]
            for a in sorted(view.announcements(), key=rank)
            if a.peer.multiaddrs and a.state is PeerState.SERVING and a.peer.peer_id not in gone
        ]
        found.sort(key=_is_local)
        return (found or list(self._state.initial_peers))[:MAX_JOIN_ADDRESSES]

    def model_reference(self) -> str:
        """What a peer on this machine is to be given as ``--model``; its mere name where the settings say another."""
        name, reference = self._state.client.profile.name, self._state.settings.model.name
        with contextlib.suppress(SwarmError):
            if name not in BUILT_IN and resolve(reference).name == name:
                return reference
        return name

    async def fragments(self, page: str, *, control: bool) -> dict[str, str]:
        """The parts of a page that change: names of server-sent events with their HTML.

        ``control``: with what starts and stops peers.
        """
        now = await self.map()
        parts = {"pill": self.render("_pill.html", map=now)}
        if page == "swarm":
            parts["map"] = self.render("_map.html", map=now, control=control)
        elif page == "peers":
            parts["own"] = self.render("_own.html", peers=self._state.local_peers.peers(), map=now, control=control)
            parts["join"] = self.render("_join.html", **self.join())
        return parts

    def join(self) -> dict[str, Any]:
        """For another machine, to which an address of the loopback is of no use unless there is no other."""
        known, profile = self.join_addresses(), self._state.client.profile
        elsewhere = [address for address in known if not _is_local(address)]
        return {
            "addresses": elsewhere or known,
            "only_here": bool(known) and not elsewhere,
            "reference": self.model_reference(),
            "dtype": profile.dtype,
            "weights": profile.weights,
            "version": version("swarm-inference"),
        }

    async def feed(self, page: str, *, control: bool) -> AsyncIterator[str]:
        """Server-sent events: a part whenever it has changed, until the gateway ends."""
        sent: dict[str, str] = {}
        silent_s = 0.0
        while not self._state.hub.closed:
            for name, html in (await self.fragments(page, control=control)).items():
                if sent.get(name) != html:
                    sent[name] = html
                    silent_s = 0.0
                    yield sse(name, html)
            if silent_s >= self._state.settings.gateway.keep_alive_s:
                silent_s = 0.0
                yield STILL_HERE
            await asyncio.sleep(TICK_S)
            silent_s += TICK_S


def _is_local(address: str) -> bool:
    return address.startswith(("/ip4/127.", "/ip6/::1/"))
