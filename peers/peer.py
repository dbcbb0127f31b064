"""What lasts of a peer while ranges come and go: who it is, what it has, how it is known to others."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import swarm
from peers.dial_back import DialBack
from peers.engine import Engine
from peers.machine import Report, Speed, gflops, load_shard
from peers.process_memory import return_freed_heap
from peers.seat import Room
from peers.shard import Shard
from peers.stopping import Stopping
from swarm.config import Settings
from swarm.discovery import Announcer, SwarmView
from swarm.identity import Identity
from swarm.libp2p import Libp2pTransport
from swarm.models import ModelProfile, ModelReference
from swarm.types import Announcement, LayerRange, PeerState

if TYPE_CHECKING:
    from peers.metrics import PeerMetrics

GUESSED_BYTES_PER_S = 1e10
"""Of weights read for one token, before anything is measured: a CPU's memory."""


@dataclass(slots=True)
class Peer:
    settings: Settings
    reference: ModelReference
    profile: ModelProfile
    files: dict[str, bytes]
    """Small ones of the model, for clients."""
    device: torch.device
    room: Room
    identity: Identity
    transport: Libp2pTransport
    view: SwarmView
    announcer: Announcer
    stopping: Stopping
    report: Report
    speed: Speed | None
    """As it was measured last, perhaps in an earlier run."""
    dial_back: DialBack
    metrics: PeerMetrics | None = None
    cut_off: int = 0
    """Sessions that were still here when their stage was freed."""

    def announcement(self, layers: LayerRange, state: PeerState) -> Announcement:
        """Without what only a peer that serves can say."""
        speed = self.speed
        guess_s = self.profile.layer_bytes / GUESSED_BYTES_PER_S
        return Announcement(
            peer=self.transport.local,
            model=self.profile.model_id,
            layers=layers,
            state=state,
            version=swarm.__version__,
            decode_s_per_layer=speed.decode_s_per_layer if speed else guess_s,
            prefill_s_per_token_layer=speed.prefill_s_per_token_layer if speed else guess_s,
            kv_tokens_free=0,
            capacity=self.room.capacity,
            memory_mb=self.room.given_bytes // 10**6,
            gflops=gflops(self.profile, speed) if speed else 0.0,
            gpu=self.device.type != "cpu",
        )

    def load(self, layers: LayerRange) -> asyncio.Task[Shard]:
        """In a thread. Raises :class:`NotAdmitted` if the owner has set a limit and the layers don't fit it."""
        plan = self.room.divide(self.profile, layers)
        began: dict[str, object] = {"event": "loading", "layers": [layers.start, layers.end], "percent": 0}
        self.report(began | {"memory": plan.sentence()})
        return asyncio.create_task(self._load(layers, self.report))

    @contextlib.asynccontextmanager
    async def borrow(self, layers: LayerRange) -> AsyncGenerator[Engine]:
        """Some layers of our checkpoint, for a probe."""
        async with Engine(await self._load(layers, lambda event: None), self.settings) as engine:
            yield engine
        del engine
        return_freed_heap()

    async def _load(self, layers: LayerRange, report: Report) -> Shard:
        """Once nobody waits for it any more the thread ends, too, and with it what it has in memory."""
        given_up = threading.Event()
        arguments = self.reference, self.profile, layers, self.settings, report, given_up.is_set
        try:
            return await asyncio.to_thread(load_shard, *arguments)
        finally:
            given_up.set()
