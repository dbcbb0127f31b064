"""The distributed hash table (Kademlia; Maymounkov & Mazieres 2002) that announcements live on.

One hivemind ``DHTNode``, hardened in ``dht_node.py``, on the transport's daemon and event loop; not the forked
``hivemind.DHT``. Three more departures from hivemind:

- *Healing.* Initial peers and those of a peer book that are not in the routing table are pinged for ever, so a
  restarted bootstrap peer doesn't split the swarm (D10).
- *One time.* Pings make the clocks of a swarm agree (``swarm.dht_time``).
- *No caches.* A view that routes must see the latest (D4), and keeps its own copy.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import random
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from swarm import _hivemind, multiaddrs
from swarm.atomic_file import write_atomically
from swarm.awake import timeout_awake
from swarm.config import Settings
from swarm.dht_node import MAX_TTL_S, MAX_VALUE_BYTES, RecordCheck, RecordValidator, create_node, node_id_of
from swarm.dht_time import dht_time
from swarm.errors import SwarmError, Unreachable
from swarm.libp2p import Libp2pTransport
from swarm.types import PeerAddress, PeerId

_PeerID: Any = _hivemind.load("hivemind.p2p").PeerID

log = logging.getLogger(__name__)

MAX_BOOK = 256
"""Peers in the peer book."""
_BOOK_PINGS = 16
"""Book peers that are pinged in one period."""
_PACKING_BYTES = 3
"""What msgpack adds to a value."""
_RETRY_S = 0.5
"""The first ping after a peer's restart fails on the stale connection; the second, after this, doesn't."""
_BAN_S = 15.0
"""A peer that did not answer is left out of searches for this long (hivemind doubles it each time, without end)."""


class Dht:
    """``async with Dht(transport, settings, check) as dht``: store and read signed records.

    A listening transport makes a full node, another one a client that only asks. Works alone, finds the others later.
    ``book``: a file of peers, read at the start and written now and then, for finding back if no initial peer answers.
    """

    def __init__(
        self, transport: Libp2pTransport, settings: Settings, check: RecordCheck, book: str | os.PathLike[str] = ""
    ) -> None:
        self._transport = transport
        self._settings = settings
        self._validator = RecordValidator(check)
        self._book_file = Path(book).expanduser() if book else None
        self._book: dict[PeerId, PeerAddress] = {}
        self._initial: dict[PeerId, PeerAddress] = {}
        self._client = not transport.local.multiaddrs
        self._dht: Any = None
        self._exit = contextlib.AsyncExitStack()

    @property
    def peers(self) -> int:
        """Nodes in the routing table."""
        return len(self._dht.protocol.routing_table.uid_to_peer_id) if self._dht is not None else 0

    async def __aenter__(self) -> Self:
        timeouts = self._settings.timeouts
        for peer in _read_book(self._book_file):
            self.remember(peer)
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with timeout_awake(timeouts.dht_s):
                    self._dht = await create_node(
                        p2p=self._transport.p2p,
                        node_id=node_id_of(self._transport.p2p.peer_id.to_bytes()),
                        wait_timeout=timeouts.connect_s,
                        cache_locally=False,
                        cache_nearest=0,
                        cache_on_store=False,
                        cache_refresh_before_expiry=0,
                        reuse_get_requests=False,
                        blacklist_time=_BAN_S,
                        backoff_rate=1.0,
                        client_mode=self._client,
                        record_validator=self._validator,
                        strict=False,
                    )
            except TimeoutError:
                raise Unreachable("the own DHT node did not start within timeouts.dht_s") from None
            stack.push_async_callback(self._stop)
            self._transport.on_restart(self._after_restart)
            healing = asyncio.create_task(self._heal(), name="heal the DHT")
            stack.push_async_callback(_cancel, healing)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    # --- records -----------------------------------------------------------------------------------------------------

    async def store(self, key: str, subkey: str, value: bytes, ttl_s: float) -> bool:
        """Write one record to the nodes nearest to ``key``. False: too big, not the latest, or nobody took it."""
        too_big = len(value) > MAX_VALUE_BYTES - _PACKING_BYTES or not ttl_s <= MAX_TTL_S
        if self._dht is None or not self._transport.alive or too_big:
            return False
        expiration = dht_time() + ttl_s
        try:
            async with asyncio.timeout(self._settings.timeouts.dht_s):
                return bool(await self._dht.store(key, value, expiration, subkey=subkey, exclude_self=self._client))
        except TimeoutError:
            log.warning("storing %s took longer than timeouts.dht_s", key)
        except Exception as error:  # hivemind raises anything; what isn't stored now is stored next time
            log.warning("storing %s failed: %r", key, error)
        return False

    async def get(self, key: str) -> dict[str, tuple[bytes, float]]:
        """Subkey -> (value, expiration in Unix time). Raises :class:`Unreachable` if nobody answers in time."""
        return (await self.get_many([key]))[key]

    async def get_many(self, keys: Collection[str]) -> dict[str, dict[str, tuple[bytes, float]]]:
        """As :meth:`get`, for all keys in one search."""
        if self._dht is None or not self._transport.alive:
            raise Unreachable("the DHT can't be read: this process is not connected")
        try:
            async with timeout_awake(self._settings.timeouts.dht_s):
                results = await self._dht.get_many(keys, sufficient_expiration_time=math.inf)
        except TimeoutError:
            raise Unreachable("the DHT can't be read: it took longer than timeouts.dht_s") from None
        except Exception as error:  # as in store
            raise Unreachable(f"the DHT can't be read: {error!r}") from error
        if self._client and not self.peers:
            raise Unreachable("the DHT can't be read: none of its nodes answers")
        found: dict[str, dict[str, tuple[bytes, float]]] = {key: {} for key in keys}
        for key, result in results.items():
            if result is not None and isinstance(result.value, dict):
                found[key] = {subkey: (entry.value, entry.expiration_time) for subkey, entry in result.value.items()}
        return found

    # --- peers -------------------------------------------------------------------------------------------------------

    async def connect(self, initial_peers: Iterable[str]) -> int:
        """Join through these peers and ping them for ever after; if none of them answers, through those of the peer
        book. Returns how many answered.

        Raises :class:`ConfigError` for a malformed address and, for a client only, :class:`Unreachable` if none
        answers; a peer that serves goes on alone: they may come later.
        """
        peers = multiaddrs.peer_addresses(initial_peers)
        self._initial.update((peer.peer_id, peer) for peer in peers if peer.peer_id != self._transport.local.peer_id)
        others = [peer for peer in peers if peer.peer_id != self._transport.local.peer_id]
        failures = await self._ping_all(others)
        answered = len(others) - len(failures)
        if not answered:
            known = [peer for peer in self._book.values() if peer.peer_id not in self._initial]
            answered = len(known) - len(await self._ping_all(known))
        if others and not answered:
            tried = "\n".join(f"  {', '.join(peer.multiaddrs)}: {failures[peer.peer_id]}" for peer in others)
            who = f"none of the {len(others)} initial peers" if len(others) > 1 else "the initial peer has not"
            message = f"{who} answered:\n{tried}"
            if self._client:
                raise Unreachable(message)
            log.warning("%s", message)
        return answered

    def remember(self, peer: PeerAddress) -> None:
        """Put a peer with addresses into the peer book; the oldest one goes when it is full."""
        if peer.peer_id == self._transport.local.peer_id or not peer.multiaddrs:
            return
        self._book.pop(peer.peer_id, None)
        self._book[peer.peer_id] = peer
        while len(self._book) > MAX_BOOK:
            del self._book[next(iter(self._book))]

    async def _ping_all(self, peers: Collection[PeerAddress]) -> dict[PeerId, str]:
        """Why each of those failed that did. If one came back or is new, look for our own neighbours through it."""
        news = any(self._is_missing(peer) for peer in peers)
        outcomes = await asyncio.gather(*(self._ping(peer) for peer in peers))
        dht_time.agree(ahead_s for _, ahead_s in outcomes)
        failures = {peer.peer_id: why for peer, (why, _) in zip(peers, outcomes, strict=True) if why is not None}
        if news and len(failures) < len(peers):
            with contextlib.suppress(Exception):  # a search that fails now is made again at the next ping
                async with asyncio.timeout(self._settings.timeouts.dht_s):
                    await self._dht.find_nearest_nodes([self._dht.node_id])
        return failures

    async def _ping(self, peer: PeerAddress) -> tuple[str | None, float]:
        """Dial and ping, twice. ``None`` if the peer answered, else why not; how far it is ahead of us, or NaN."""
        why: str | None = None
        for attempt in range(2):
            if attempt:
                await asyncio.sleep(_RETRY_S)
            try:
                await self._transport.connect(peer)
                raw = _PeerID.from_base58(peer.peer_id)
                async with timeout_awake(self._settings.timeouts.dht_s):
                    protocol = self._dht.protocol
                    node_id, ahead_s = await asyncio.gather(protocol.call_ping(raw), protocol.ahead_s(raw))
                    if node_id is not None:
                        self._dht.blacklist.register_success(raw)
                        return None, ahead_s
                why = why or "it is no node of this DHT, or did not answer"
            except SwarmError as error:
                why = why or error.message  # the first reason: the second is often p2pd's back-off
            except Exception as error:  # as in store
                why = why or repr(error)
        return why, math.nan

    def _is_missing(self, peer: PeerAddress) -> bool:
        return _PeerID.from_base58(peer.peer_id) not in self._dht.protocol.routing_table

    def _to_ping(self) -> list[PeerAddress]:
        """All initial peers (one that died may still be in the table), and some book peers that the table lacks."""
        lost = [peer for peer in self._book.values() if peer.peer_id not in self._initial and self._is_missing(peer)]
        return [*self._initial.values(), *random.sample(lost, min(len(lost), _BOOK_PINGS))]

    async def _heal(self) -> None:
        while True:
            await asyncio.sleep(self._settings.discovery.ping_period_s)
            try:
                if self._transport.alive:
                    await self._ping_all(self._to_ping())
                if self._transport.alive:
                    self._forget_finished_calls()
                _write_book(self._book_file, self._book.values())
            except Exception:  # healing must not end, whatever happened
                log.exception("healing the DHT failed")

    def _forget_finished_calls(self) -> None:
        """hivemind keeps the task of every RPC that its caller has cancelled."""
        tasks = self._transport.p2p._client.control._handler_tasks
        for call in [call for call, task in tasks.items() if task.done()]:
            del tasks[call]

    async def _after_restart(self) -> None:
        """p2pd was restarted: the node goes on with what it knows, on the new daemon."""
        if self._dht is None:
            return
        self._dht.p2p = self._dht.protocol.p2p = self._transport.p2p
        if not self._client:
            await self._dht.protocol.add_p2p_handlers(self._transport.p2p)
        self._dht.blacklist.clear()
        await self._ping_all(list({**self._book, **self._initial}.values()))

    async def _stop(self) -> None:
        node, self._dht = self._dht, None
        _write_book(self._book_file, self._book.values())
        with contextlib.suppress(Exception):  # the daemon may be dead already, and ends in any case
            async with asyncio.timeout(self._settings.timeouts.connect_s):
                await node.shutdown()


# --- the peer book ---------------------------------------------------------------------------------------------------


def _read_book(file: Path | None) -> list[PeerAddress]:
    if file is None:
        return []
    try:
        return multiaddrs.peer_addresses(str(text) for text in json.loads(file.read_text())[: 8 * MAX_BOOK])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, SwarmError) as error:
        log.warning("peer book %s is ignored: %s", file, error)
        return []


def _write_book(file: Path | None, peers: Iterable[PeerAddress]) -> None:
    if file is None:
        return
    texts = [text if "/p2p/" in text else f"{text}/p2p/{peer.peer_id}" for peer in peers for text in peer.multiaddrs]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(texts).encode())
    except OSError as error:
        log.warning("can't write the peer book %s: %s", file, error)


async def _cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
