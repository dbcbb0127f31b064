"""``swarm-peer probe`` on a tiny checkpoint: what it tells, as JSON and as sentences."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peers.seat import Room
from peers.survey import lines, survey
from swarm.config import ModelSettings, NetworkSettings, PeerSettings, PolicySettings, Settings
from swarm.errors import NotAdmitted
from swarm.identity import Identity
from swarm.models import load_profile, resolve
from swarm.types import LayerRange
from tests.checkpoints import make_checkpoint


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_checkpoint(tmp_path / "model", "llama", layers=6)
    return replace(Settings(), model=ModelSettings(name=str(folder)), peer=PeerSettings(device="cpu", threads=1))


async def probed(settings: Settings, *, fresh: bool = False) -> dict[str, Any]:
    events: list[dict[str, object]] = []
    await survey(settings, events.append, fresh=fresh)
    (event,) = events
    return json.loads(json.dumps(event))  # type: ignore[no-any-return]


async def test_it_tells_devices_room_and_speed_and_measures_once(settings: Settings) -> None:
    first, second, third = [await probed(settings, fresh=fresh) for fresh in (False, False, True)]
    assert first["devices"][-1]["kind"] == "cpu"
    assert 0 < first["devices"][-1]["free_mb"] < first["devices"][-1]["total_mb"]
    assert first["capacity"]["whole"]
    assert [event["speed"]["cached"] for event in (first, second, third)] == [False, True, False]
    assert second["speed"]["decode_s_per_layer"] == first["speed"]["decode_s_per_layer"] > 0
    assert first["admitted"]
    assert any("room for all of it" in line for line in lines(first))
    assert any("measured before" in line for line in lines(second))


async def test_the_policy_and_a_peer_that_does_not_answer_are_told(settings: Settings) -> None:
    nobody = f"/ip4/127.0.0.1/tcp/9/p2p/{Identity.ephemeral().peer_id}"
    settings = replace(settings, policy=PolicySettings(gpu_required=True), network=NetworkSettings((nobody,)))
    event = await probed(settings)
    assert not event["admitted"]
    (way,) = event["peers"]
    assert way["error"]
    assert way["round_trip_ms"] is None
    said = "\n".join(lines(event))
    assert "has no GPU" in said
    assert f"peer {way['peer_id'][-6:]}: {way['error']}" in said


async def test_a_machine_without_room_for_a_layer_is_refused(settings: Settings) -> None:
    with pytest.raises(NotAdmitted, match=r"fits what this peer may take \(--max-memory-mb"):
        await probed(replace(settings, peer=replace(settings.peer, max_memory_mb=1)))


def test_the_room_that_a_peer_tells_is_what_its_ranges_get(settings: Settings) -> None:
    profile = load_profile(resolve(settings.model.name))
    room = Room.of(replace(settings, peer=replace(settings.peer, max_memory_mb=14)), profile, 0, on_cpu=True)
    most = room.capacity.middle
    assert room.divide(profile, LayerRange(1, 1 + most)).fits


def test_a_peer_without_a_limit_takes_no_more_than_its_kv_budget(settings: Settings) -> None:
    profile = load_profile(resolve(settings.model.name))
    room = Room.of(replace(settings, peer=replace(settings.peer, max_memory_mb=0)), profile, 64 * 10**9, on_cpu=True)
    plan = room.divide(profile, LayerRange(1, 3))
    assert plan.kv_bytes == settings.peer.kv_budget_mb * 2**20
    assert plan.given_bytes == plan.weights_bytes + plan.buffers_bytes + plan.kv_bytes


def test_a_peer_without_a_limit_keeps_no_more_kv_than_is_free_beside_its_weights(settings: Settings) -> None:
    """Such as one in a container with little memory, which the kernel ends beyond."""
    profile = load_profile(resolve(settings.model.name))
    unlimited = replace(settings, peer=replace(settings.peer, max_memory_mb=0))
    for free_mb, most_mb in ((600, 600), (200_000, settings.peer.kv_budget_mb)):
        room = Room.of(unlimited, profile, free_mb * 10**6, on_cpu=True)
        plan = room.divide(profile, LayerRange(1, 11))
        assert plan.fits
        assert room.settings_for(unlimited, plan).peer.kv_budget_mb == plan.kv_bytes // 2**20 <= most_mb
