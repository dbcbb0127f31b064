"""What the gateway's routes share."""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field

from swarm.client import AsyncClient
from swarm.config import Settings
from swarm.gateway.generations import Generations
from swarm.gateway.hub import GenerationHub
from swarm.gateway.local_peers import LocalPeers


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what."""

    host: str = "127.0.0.1"
    """Where the gateway listens."""
    api_key: str = ""
    """Empty: nobody is asked for one."""
    allow_remote_control: bool = False
    """Peers of this machine may be started and stopped although the gateway listens on more than the loopback."""
    control_token: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    """What the console's page has to send with every request that changes something; new for each process."""

    @property
    def on_loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class GatewayState:
    """One for each application; routes get it as an argument of their router's factory."""

    client: AsyncClient
    """Entered already; one model."""
    settings: Settings
    access: Access
    initial_peers: tuple[str, ...]
    """Addresses by which others can join this swarm."""
    hub: GenerationHub
    """Events of all generations, see :mod:`swarm.gateway.hub`."""
    generations: Generations
    """Runs generations: ``async with generations.reserve(1) as r: async for event in r.stream(request, ...)``."""
    local_peers: LocalPeers
    """Those that this gateway started; outside of its context it can't start any."""

    @classmethod
    def of(
        cls,
        client: AsyncClient,
        settings: Settings,
        access: Access,
        initial_peers: tuple[str, ...] = (),
        local_peers: LocalPeers | None = None,
    ) -> GatewayState:
        hub = GenerationHub(settings.gateway.watch_events)
        generations = Generations(client, hub, settings.gateway)
        return cls(client, settings, access, initial_peers, hub, generations, local_peers or LocalPeers())

    def end(self) -> None:
        """What runs ends, and nothing more begins."""
        self.generations.ending.begin()
        self.hub.close()
