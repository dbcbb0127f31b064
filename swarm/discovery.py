"""Announcements and the swarm view: who serves which layers, learned from signed records on the DHT.

One record per peer, under the key ``swarm:MODEL:BUCKET`` of its first layer's bucket (``layers_per_bucket`` layers
each); the subkey is the peer id. What stands in a record: ``swarm.announcement_record``. Peers with the first layer
store theirs under the model's name as well, so that who knows only that finds them through any peer of the swarm (a
key has room for 3,000, and a few will do).

On paper, for 100,000 peers of one 80-layer model (10 buckets, TTL 45 s, renewed every 15 s):

- A record has about 540 bytes, and 60 more with its subkey and expiration, so 60 MB in all and 300 MB with 5 replicas,
  each key on its 5 nearest nodes only.
- Renewal: 6,700 stores a second in the swarm; one per peer every 15 s, each some 5 lookups (log2(100,000) = 17 at most)
  and 5 stores, so about 10 messages and 6 KB a peer and period: 0.4 KB/s. News of links are announced at once, but only
  when a link was measured for the first time: at most eight more stores while a peer's neighbourhood is new.
- Reading everything: 10 keys of 10,000 entries, 5.9 MB each. That is more than the 3,000 entries a key may have
  (``dht_node``; a message of p2pd ends at 4 MiB). So beyond 3,000 peers a bucket the key would need a shard number
  (peer id modulo shards) and readers a sample of shards: a planner needs hundreds of candidates, not all of them.
- The limit of this version is thus 3,000 peers a bucket (1.8 MB), 30,000 for such a model, and a view then reads 18 MB
  a refresh. With 300 peers it reads 180 KB every 10 s.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Protocol

from swarm.announcement_record import decode_announcement, encode_announcement
from swarm.config import DiscoverySettings, PlannerSettings
from swarm.dht_time import dht_time
from swarm.errors import SwarmError
from swarm.identity import Identity
from swarm.link_times import Links, links_of
from swarm.types import MAX_LIFETIME_S, Announcement, ModelId, PeerAddress, PeerId, PeerState

log = logging.getLogger(__name__)

MAX_SKEW_S = 30.0
"""A clock that differs from ours by more than this is worth a warning."""


class RecordStore(Protocol):
    """What discovery needs of ``swarm.dht.Dht``."""

    async def store(self, key: str, subkey: str, value: bytes, ttl_s: float) -> bool: ...

    async def get_many(self, keys: Collection[str]) -> dict[str, dict[str, tuple[bytes, float]]]:
        """Raises a :class:`SwarmError` if nothing can be read now."""
        ...


# --- keys ------------------------------------------------------------------------------------------------------------


def bucket_of(layer: int, layers_per_bucket: int) -> int:
    return layer // layers_per_bucket


def key_of(model: ModelId, bucket: int) -> str:
    """The DHT key for peers of ``model`` whose range starts in ``bucket``."""
    return f"swarm:{model}:{bucket}"


def keys_of(model: ModelId, num_layers: int, layers_per_bucket: int) -> list[str]:
    """All keys of a model; a range starts before its last layer."""
    return [key_of(model, bucket) for bucket in range(math.ceil(num_layers / layers_per_bucket))]


def key_of_name(name: str) -> str:
    """The DHT key for peers with the first layer of a model of this name, whatever its weights."""
    return f"swarm:named:{name}"


def name_of(model: ModelId) -> str:
    return model.rpartition("@")[0]


# --- the announcer ---------------------------------------------------------------------------------------------------


class Announcer:
    """Keeps one peer's announcement alive on the DHT: ``async with Announcer(...) as announcer``, then :meth:`update`.

    Nothing is published before the first :meth:`update`. Leaving the context publishes the tombstone.
    """

    def __init__(
        self,
        store: RecordStore,
        identity: Identity,
        settings: DiscoverySettings,
        clock: Callable[[], float] = dht_time,
    ) -> None:
        self._store = store
        self._identity = identity
        self._settings = settings
        self._clock = clock
        self._current: Announcement | None = None
        self._sent_at = 0.0
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Announcer:
        self._task = asyncio.create_task(self._keep_renewing(), name="announce")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    async def update(self, announcement: Announcement) -> bool:
        """Publish at once, and from now on every period. False: the DHT did not take it; the next period tries again.

        ``sent_at`` is set here. If the range has moved to another bucket or model, the old record becomes a tombstone.
        """
        encode_announcement(replace(announcement, sent_at=self._clock()), self._identity)  # raises before any change
        async with self._lock:
            old, self._current = self._current, announcement
            if old is not None and self._key(old) != self._key(announcement):
                await self._publish(replace(old, state=PeerState.LEFT))
            return await self._publish(announcement)

    async def leave(self) -> None:
        """Stop announcing, and say so with a tombstone. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        async with self._lock:
            last, self._current = self._current, None
            if last is not None:
                await self._publish(replace(last, state=PeerState.LEFT))

    async def renew(self) -> None:
        """Publish the current announcement again, for example when p2pd was restarted (``transport.on_restart``)."""
        async with self._lock:
            if self._current is not None:
                await self._publish(self._current)

    def age_s(self) -> float:
        """Since the last announcement; infinite before the first."""
        return self._clock() - self._sent_at if self._sent_at else math.inf

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self._settings.announce_period_s)
            try:
                await self.renew()
            except Exception:  # silence would look like death; whatever it was, the next period tries again
                log.exception("announcing failed")

    async def _publish(self, announcement: Announcement) -> bool:
        now, lifetime_s = self._clock(), self._settings.announce_ttl_s
        if self._sent_at + lifetime_s > now + MAX_LIFETIME_S:
            self._sent_at = 0.0  # by a clock that was wrong then, or is now: no node keeps a record for so long
        # later than every record before, even if the clock was set back: the DHT keeps the latest expiration
        self._sent_at = max(now, self._sent_at + 0.001)
        signed = replace(announcement, sent_at=self._sent_at, lifetime_s=lifetime_s)
        record = encode_announcement(signed, self._identity)
        ttl_s = lifetime_s + self._sent_at - now
        keys = [self._key(announcement)]
        if announcement.layers.start == 0:
            keys.append(key_of_name(name_of(announcement.model)))
        stored, *_ = await asyncio.gather(
            *(self._store.store(key, self._identity.peer_id, record, ttl_s) for key in keys)
        )
        if not stored:
            log.warning("the DHT did not take the announcement (is our clock right?); trying again later")
        return stored

    def _key(self, announcement: Announcement) -> str:
        bucket = bucket_of(announcement.layers.start, self._settings.layers_per_bucket)
        return key_of(announcement.model, bucket)


# --- models by name --------------------------------------------------------------------------------------------------


async def peers_by_name(store: RecordStore, names: Collection[str]) -> list[list[PeerAddress]]:
    """Of each model with one of these names or identities, whom to ask for it; the one of most peers comes first.

    Anybody may call a model so; only an identity is sure. Raises a :class:`SwarmError` if nothing can be read now.
    """
    known_as = {*names, *(name_of(ModelId(name)) for name in names)} - {""}
    found = await store.get_many([key_of_name(name) for name in sorted(known_as)])
    models: dict[ModelId, dict[PeerId, PeerAddress]] = {}
    for records in found.values():
        for peer_id, (record, _) in records.items():
            told = decode_announcement(peer_id, record)
            if told is not None and told.state is PeerState.SERVING and {told.model, name_of(told.model)} & set(names):
                models.setdefault(told.model, {})[told.peer.peer_id] = told.peer
    return [list(peers.values()) for peers in sorted(models.values(), key=len, reverse=True)]


# --- the view --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Seen:
    announcement: Announcement
    first_seen: float
    """By our monotonic clock, when this ``sent_at`` was first read; ages count from here, never from foreign clocks."""


def _end(announcement: Announcement) -> float:
    return announcement.sent_at + announcement.lifetime_s


class SwarmView:
    """What this process knows of the peers of one model: ``async with SwarmView(...) as view``.

    Refreshed in the background; :meth:`announcements` never waits, so it may be called on the path of a token. Entering
    the context does the first refresh.
    """

    def __init__(
        self,
        store: RecordStore,
        model: ModelId,
        num_layers: int,
        settings: DiscoverySettings,
        *,
        on_seen: Callable[[PeerAddress], None] | None = None,
        check: Callable[[Announcement], str | None] = lambda announcement: None,
        planner: PlannerSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = dht_time,
    ) -> None:
        """``on_seen``: told of every live peer at each refresh, for example ``Dht.remember``.

        ``check``: the reason for which planners leave an announcement out, or ``None``; ``swarm.admission`` has it.
        """
        self._store = store
        self._model = model
        self._num_layers = num_layers
        self._settings = settings
        self._on_seen = on_seen
        self.check = check
        self._planner = planner or PlannerSettings()
        self._links: Links | None = None
        self._clock = clock
        self._wall_clock = wall_clock
        self._seen: dict[PeerId, _Seen] = {}
        self._looked = self._refreshed = -math.inf
        """When the DHT was last asked, and when it last answered."""
        self._warned: set[PeerId] = set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> SwarmView:
        await self.refresh()
        self._task = asyncio.create_task(self._keep_fresh(), name="refresh the swarm view")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def announcements(self) -> list[Announcement]:
        """Of all peers that are there, by peer id: joining, serving and draining ones, heard of within the TTL."""
        return [
            seen.announcement
            for _, seen in sorted(self._seen.items())
            if seen.announcement.state is not PeerState.LEFT and self._age(seen) <= self._settings.announce_ttl_s
        ]

    def links(self) -> Links:
        """The link times that the peers announce; worked out once for each refresh, and by it once somebody asks.

        For 10,000 peers that takes twice as long as a plan, so no plan but the first should wait for it.
        """
        if self._links is None:
            link_s, bytes_per_s = self._planner.link_s, self._planner.bytes_per_s
            self._links = links_of(self.announcements(), self.age, default_s=link_s, bytes_per_s=bytes_per_s)
        return self._links

    def age(self, peer_id: PeerId | None = None) -> float:
        """Seconds since a peer's latest announcement was first read, or since the DHT was; infinite if never."""
        if peer_id is None:
            return self._clock() - self._refreshed
        seen = self._seen.get(peer_id)
        return math.inf if seen is None else self._age(seen)

    def since_look(self) -> float:
        """Seconds since the end of the last refresh, even if the DHT did not answer; infinite if there was none."""
        return self._clock() - self._looked

    def forget(self, peer_id: PeerId) -> None:
        """This peer has just failed: leave it out until it announces itself again."""
        seen = self._seen.get(peer_id)
        if seen is not None:
            gone = replace(seen.announcement, state=PeerState.LEFT)
            self._seen[peer_id] = _Seen(gone, seen.first_seen)

    async def refresh(self) -> list[Announcement]:
        """Read all buckets now, and return :meth:`announcements`: if the DHT does not answer, what was known before."""
        keys = keys_of(self._model, self._num_layers, self._settings.layers_per_bucket)
        try:
            found = await self._store.get_many(keys)
        except SwarmError as error:
            log.warning("the swarm view was not refreshed: %s", error)
            return self.announcements()
        finally:
            self._looked = self._clock()
        for records in found.values():
            for peer_id, (record, expiration) in records.items():
                self._take(decode_announcement(peer_id, record), expiration)
        self._refreshed = self._looked
        # an entry is kept for a while after its end, so that an old replica can't bring back what has left
        for peer_id in [p for p, seen in self._seen.items() if self._age(seen) > 2 * MAX_LIFETIME_S]:
            del self._seen[peer_id]
        if self._links is not None:
            self._links = None
            self.links()
        present = self.announcements()
        if self._on_seen is not None:
            for announcement in present:
                self._on_seen(announcement.peer)
        return present

    def _take(self, announcement: Announcement | None, expiration: float) -> None:
        if announcement is None or announcement.model != self._model:
            return
        if any(layers.end > self._num_layers for layers in (announcement.layers, announcement.moving_to) if layers):
            return
        peer_id = announcement.peer.peer_id
        known, now = self._seen.get(peer_id), self._wall_clock()
        if known is not None and known.announcement.sent_at >= announcement.sent_at:
            # what ends later than anything may was sent by a clock that has been put right since, as ours may have been
            put_right = _end(announcement) <= now + MAX_LIFETIME_S < _end(known.announcement)
            if not put_right:
                return
        # one that renews a known one is new by definition; one read for the first time may be old, and only the peer's
        # clock can tell how old: if that is wrong, the next renewal puts it right
        age_s = 0.0 if known else min(max(now - announcement.sent_at, 0.0), self._settings.announce_ttl_s)
        self._seen[peer_id] = _Seen(announcement, self._clock() - age_s)
        # sent in our future, or still on the DHT though expired for us: one of the clocks is wrong
        skew_s = max(announcement.sent_at - now, now - expiration)
        if skew_s > MAX_SKEW_S and peer_id not in self._warned:
            self._warned.add(peer_id)
            log.warning("the clock of peer %s and ours differ by %.0f s or more", peer_id, skew_s)

    def _age(self, seen: _Seen) -> float:
        return self._clock() - seen.first_seen

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._settings.view_period_s)
            try:
                await self.refresh()
            except Exception:  # the view goes stale, which age() tells; the loop must go on
                log.exception("refreshing the swarm view failed")
