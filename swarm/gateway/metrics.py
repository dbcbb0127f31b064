"""The gateway's numbers for Prometheus. Counted from the hub's events; what is a state is read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from swarm.gateway.generations import Generations
from swarm.gateway.hub import Began, Ended, GenerationEvent, RouteTaken, TokenOut
from swarm.telemetry import COUNTS, SECONDS, gauge


class GatewayMetrics:
    """Observes the hub of ``generations`` from now on."""

    def __init__(self, generations: Generations) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._answers = Counter(
            "swarm_gateway_answers", "Answers of the OpenAI routes by status", ["route", "status"], registry=registry
        )
        self._generations = Counter(
            "swarm_gateway_generations", "Generations that ended", ["source", "finish_reason"], registry=registry
        )
        self._tokens = Counter("swarm_gateway_tokens", "Tokens taken in and given out", ["kind"], registry=registry)
        self._rebuilds = Counter("swarm_gateway_rebuilds", "Routes that were rebuilt", ["cause"], registry=registry)
        self._first = _seconds("swarm_gateway_first_token", "From the request to the first token", registry)
        self._gap = _seconds("swarm_gateway_token_gap", "From token to token", registry)
        self._stall = _seconds("swarm_gateway_rebuild", "What a rebuild made the user wait", registry)
        self._hop = Histogram(
            "swarm_gateway_hop_seconds",
            "Time of one token at one hop, or on the way to the next",
            ["part"],
            buckets=SECONDS,
            registry=registry,
        )
        self._batch = Histogram(
            "swarm_gateway_hop_batch_sessions",
            "Sessions that a hop computed together with ours",
            buckets=COUNTS,
            registry=registry,
        )
        self._parts = {part: self._hop.labels(part) for part in ("queue", "compute", "link")}
        self._sources: dict[str, str] = {}
        registry.register(_State(generations))
        generations.hub.observers.append(self.observe)

    def answered(self, route: str, status: int) -> None:
        self._answers.labels(route, str(status)).inc()

    def observe(self, event: GenerationEvent) -> None:
        match event:
            case Began():
                self._sources[event.generation] = event.source
                self._tokens.labels("prompt").inc(event.prompt_tokens)
            case RouteTaken() if event.cause != "opened":
                self._rebuilds.labels(event.cause).inc()
                self._stall.observe(event.stalled_s)
            case TokenOut():
                self._token(event)
            case Ended():
                source = self._sources.pop(event.generation, "")
                self._generations.labels(source, event.finish_reason).inc()

    def _token(self, event: TokenOut) -> None:
        self._tokens.labels("completion").inc()
        (self._gap if event.index else self._first).observe(event.gap_s)
        for hop in event.hops:
            self._parts["queue"].observe(hop.queue_s)
            self._parts["compute"].observe(hop.compute_s)
            if hop.link_s:  # 0: not measured yet
                self._parts["link"].observe(hop.link_s)
            self._batch.observe(hop.batch)


def _seconds(name: str, help_text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(f"{name}_seconds", help_text, buckets=SECONDS, registry=registry)


class _State(Collector):
    """What is so at this moment."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        generations = self._generations
        coverage = generations.coverage()
        yield gauge("swarm_gateway_running_generations", "Generations under way", generations.gate.taken)
        yield gauge("swarm_gateway_waiting_requests", "Requests in the queue", generations.gate.waiting)
        yield gauge("swarm_view_age_seconds", "Since the DHT was read", generations.client.view.age())
        yield gauge("swarm_view_peers", "Peers that serve layers", coverage.peers)
        yield gauge("swarm_view_missing_layers", "Layers that nobody serves", sum(map(len, coverage.missing)))
        fewest = min(coverage.counts, default=0)
        yield gauge("swarm_view_peers_of_scarcest_layer", "Peers of the layer that has the fewest", fewest)
