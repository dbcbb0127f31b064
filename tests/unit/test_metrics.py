"""A peer's metrics, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from peers.metrics import PeerMetrics
from swarm.config import Settings
from swarm.gateway.generations import Generations
from swarm.gateway.hub import GenerationHub
from swarm.gateway.metrics import GatewayMetrics
from swarm.telemetry import rendered
from swarm.types import LayerRange

DASHBOARD = Path(__file__).parents[2] / "configs" / "grafana-dashboard.json"
SUFFIX = re.compile(r"_(bucket|count|sum|total)$")


def peer_metrics() -> PeerMetrics:
    announced: Any = SimpleNamespace(age_s=lambda: 7.5)
    view: Any = SimpleNamespace(age=lambda: 3.0)
    return PeerMetrics(view, announced)


def serving(metrics: PeerMetrics) -> Any:
    budget = SimpleNamespace(used_bytes=4096, limit_bytes=65536)
    service: Any = SimpleNamespace(table=SimpleNamespace(runners={1: None, 2: None}, budget=budget))
    engine: Any = SimpleNamespace(queue_length=5, layers=LayerRange(10, 20), pace=SimpleNamespace(observe=None))
    metrics.serve(service, engine)
    return engine


def values(metrics: PeerMetrics) -> dict[str, float]:
    families = text_string_to_metric_families(rendered(metrics.registry).decode())
    return {
        item.name + "".join(f" {value}" for key, value in item.labels.items() if key != "le"): item.value
        for family in families
        for item in family.samples
        if not item.name.endswith("_bucket")
    }


def test_a_peers_numbers() -> None:
    metrics = peer_metrics()
    early = values(metrics)
    assert (early["swarm_peer_announced_age_seconds"], early["swarm_view_age_seconds"]) == (7.5, 3.0)
    assert "swarm_peer_sessions" not in early, "nothing is served yet"
    engine = serving(metrics)
    engine.pace.observe([1, 1, 30], [0.0, 0.01, 0.02], 0.25)
    found = values(metrics)
    assert (found["swarm_peer_sessions"], found["swarm_peer_queued_steps"]) == (2, 5)
    assert (found["swarm_peer_kv_used_bytes"], found["swarm_peer_kv_limit_bytes"]) == (4096, 65536)
    assert (found["swarm_peer_first_layer"], found["swarm_peer_layers"]) == (10, 10)
    assert (found["swarm_peer_rows_total decode"], found["swarm_peer_rows_total prefill"]) == (2, 30)
    assert (found["swarm_peer_batch_sessions_sum"], found["swarm_peer_batch_rows_sum"]) == (3, 32)
    assert (found["swarm_peer_batch_seconds_sum"], found["swarm_peer_queue_seconds_count"]) == (0.25, 3)


def test_no_family_comes_twice() -> None:
    """Prometheus refuses a page with a family twice."""
    metrics = peer_metrics()
    serving(metrics)
    names = [family.name for family in text_string_to_metric_families(rendered(metrics.registry).decode())]
    assert len(names) == len(set(names))


async def test_every_metric_of_the_dashboard_exists() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = {
        SUFFIX.sub("", name)
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
        for name in re.findall(r"\bswarm_\w+", target["expr"])
    }
    assert len(asked) > 15
    profile = SimpleNamespace(
        name="toy",
        num_layers=4,
        layer_bytes=1,
        embedding_bytes=1,
        head_bytes=1,
        tied=False,
        dtype="float32",
        weights="auto",
    )
    view = SimpleNamespace(announcements=list, age=lambda: 0.0, check=lambda announcement: None)
    client: Any = SimpleNamespace(profile=profile, view=view)
    gateway = GatewayMetrics(Generations(client, GenerationHub(8), Settings().gateway))
    peer = peer_metrics()
    serving(peer)
    known = {
        SUFFIX.sub("", family.name)
        for registry in (gateway.registry, peer.registry)
        for family in text_string_to_metric_families(rendered(registry).decode())
    }
    assert asked <= known
