"""Swarms that arrange themselves for simulated days. Longer and larger: ``python -m tests.sim.arrangement --help``."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from statistics import mean

import pytest

from swarm.config import DiscoverySettings
from tests.sim.arrangement import Arrangement, Report, Scenario, draw


@pytest.mark.parametrize("seed", [1, 2])
def test_a_large_swarm_is_balanced_and_calm(seed: int) -> None:
    """At one loss per peer and day, three in four without a word, and some that lie about their speed."""
    report = Arrangement(Scenario(peers=1000, hours=12), seed).run()
    print(f"seed {seed}: {report.text()}")
    steady = report.after(2.0)
    assert mean(steady) >= 0.93
    assert sorted(steady)[len(steady) // 100] >= 0.85
    assert report.moves_share_per_hour < 0.05
    assert report.holes == []


@pytest.mark.slow
def test_thousands_of_peers_for_days() -> None:
    report = Arrangement(Scenario(peers=5000, hours=72), 3).run()
    print(report.text())
    assert mean(report.after(2.0)) >= 0.95
    assert min(report.after(2.0)) >= 0.85
    assert report.moves_share_per_hour < 0.01
    assert report.holes == []


@pytest.mark.parametrize(("peers", "capacities"), [(7, (8,)), (12, (8,)), (20, (8,)), (20, (3, 5, 8, 12)), (60, (4,))])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_small_swarm_closes_every_gap_that_it_has_room_for(
    peers: int, capacities: tuple[int, ...], seed: int
) -> None:
    scenario = Scenario(peers=peers, layers=30, capacities=capacities, hours=96, load_s_per_layer=0.5, liar_share=0.0)
    report = Arrangement(scenario, seed).run()
    print(f"seed {seed}: {report.text()}")
    discovery = DiscoverySettings()
    expired_s = discovery.announce_ttl_s + discovery.view_period_s
    assert max(report.closing, default=0.0) <= discovery.announce_period_s, "from knowing it"
    assert max(report.holes, default=0.0) <= expired_s + discovery.announce_period_s, "from the crash"
    assert report.moves_share_per_hour < 0.05


def test_no_single_crash_opens_a_gap_where_there_are_peers_for_two() -> None:
    report = Arrangement(Scenario(peers=60, layers=30, capacities=(4,), hours=96), 5).run()
    assert report.holes == []


def test_the_same_seed_gives_the_same_days() -> None:
    scenario = Scenario(peers=50, layers=30, hours=6)
    assert Arrangement(scenario, 7).run() == Arrangement(scenario, 7).run()


def test_the_picture_is_svg() -> None:
    scenario = Scenario(peers=50, layers=30, hours=3)
    report: Report = Arrangement(scenario, 7).run()
    root = ET.fromstring(draw(report, scenario))
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 2
