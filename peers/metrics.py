"""A peer's numbers for Prometheus. They outlive the ranges that it serves one after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from peers.engine import Engine
from peers.service import PeerService
from swarm.discovery import Announcer, SwarmView
from swarm.telemetry import COUNTS, SECONDS, gauge


class PeerMetrics:
    """Batches are counted by the compute thread; prometheus_client's counters may be used from any."""

    def __init__(self, view: SwarmView, announcer: Announcer) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._rows = Counter("swarm_peer_rows", "Positions computed", ["kind"], registry=registry)
        self._queue = Histogram(
            "swarm_peer_queue_seconds", "What a step waited for the compute thread", buckets=SECONDS, registry=registry
        )
        self._compute = Histogram(
            "swarm_peer_batch_seconds", "What a batch took to compute", buckets=SECONDS, registry=registry
        )
        self._batch = Histogram("swarm_peer_batch_sessions", "Steps in a batch", buckets=COUNTS, registry=registry)
        self._batch_rows = Histogram("swarm_peer_batch_rows", "Rows in a batch", buckets=COUNTS, registry=registry)
        self._decode, self._prefill = self._rows.labels("decode"), self._rows.labels("prefill")
        self._state = _State(view, announcer)
        registry.register(self._state)

    def serve(self, service: PeerService, engine: Engine) -> None:
        """A range is served from now on."""
        self._state.serving = service, engine
        engine.pace.observe = self.batch

    def batch(self, rows: Sequence[int], waits_s: Sequence[float], compute_s: float) -> None:
        """``rows`` and ``waits_s`` of each step that was computed."""
        self._batch.observe(len(rows))
        self._batch_rows.observe(sum(rows))
        self._compute.observe(compute_s)
        for count, waited_s in zip(rows, waits_s, strict=True):
            self._queue.observe(waited_s)
            (self._decode if count == 1 else self._prefill).inc(count)


class _State(Collector):
    """What is so at this moment."""

    def __init__(self, view: SwarmView, announcer: Announcer) -> None:
        self._view = view
        self._announcer = announcer
        self.serving: tuple[PeerService, Engine] | None = None

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield gauge("swarm_view_age_seconds", "Since the DHT was read", self._view.age())
        yield gauge("swarm_peer_announced_age_seconds", "Since the last announcement", self._announcer.age_s())
        if self.serving is None:
            return
        service, engine = self.serving
        table, layers = service.table, engine.layers
        yield gauge("swarm_peer_sessions", "Stages that are open", len(table.runners))
        yield gauge("swarm_peer_queued_steps", "Steps that wait for the compute thread", engine.queue_length)
        yield gauge("swarm_peer_kv_used_bytes", "KV caches and checkpoint logs", table.budget.used_bytes)
        yield gauge("swarm_peer_kv_limit_bytes", "What they may take", table.budget.limit_bytes)
        yield gauge("swarm_peer_first_layer", "First layer served", layers.start)
        yield gauge("swarm_peer_layers", "Layers served", len(layers))
