"""What a process knows when it plans: announcements with their link times, its own failures, its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from swarm.config import PlannerSettings
from swarm.health import Health
from swarm.link_times import Links
from swarm.plans import Check, Knowledge
from swarm.types import Announcement, PeerId


class Seen(Protocol):
    """What planning needs of the swarm view beside the announcements."""

    @property
    def check(self) -> Check:
        """The reason for which a peer is not to be used, or ``None``."""

    def links(self) -> Links: ...

    def age(self, peer_id: PeerId) -> float:
        """Seconds since the latest announcement of this peer was made."""


class View(Seen, Protocol):
    """What a session needs of discovery."""

    def announcements(self) -> Sequence[Announcement]: ...

    async def refresh(self) -> object: ...


def known(
    view: Seen,
    health: Health,
    now: float,
    planner: PlannerSettings,
    *,
    before: PeerId | None = None,
    after: PeerId | None = None,
    seed: int | None = None,
) -> Knowledge:
    """For every planner. ``now``: by the clock of ``health``; the rest as in :class:`Knowledge`."""
    return Knowledge(
        links=view.links(),
        penalties=health.costs_s(now, view.age),
        check=view.check,
        paces=health.paces.measured_s(now),
        age_s=view.age,
        before=before,
        after=after,
        hop_s=planner.hop_s,
        hop_margin_s=planner.hop_margin_s,
        seed=seed,
        spread=planner.spread,
    )
