"""A peer that moves: its new range is loaded beside the old one where both fit, and it stays if others have left."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peers.admission import Admission
from peers.engine import Engine
from peers.kv_budget import KVBudget
from peers.machine import Report, Speed
from peers.memory import MemoryPlan
from peers.peer import Peer
from peers.seat import Room
from peers.shard import Shard
from peers.stopping import Stopping
from peers.tenure import Move, Tenure, serve_range
from swarm import protocol_pb2 as pb
from swarm.admission import vouch
from swarm.config import PeerSettings, PlacementSettings, Settings
from swarm.dht_time import dht_time
from swarm.errors import ModelError, NotAdmitted
from swarm.identity import Identity
from swarm.protocol import error_to_wire
from swarm.testing import Faults, SimNetwork, SimTransport, run_virtual
from swarm.transport import INFO, Stream
from swarm.types import Announcement, LayerRange, PeerAddress, PeerId, PeerState
from tests.reference import ModelSource, profile_of
from tests.sim.world import PROFILE

MB = 1_000_000
MODEL = replace(PROFILE, num_layers=30, layer_bytes=10 * MB, hidden_size=64, embedding_bytes=MB, head_bytes=MB)
SETTINGS = replace(Settings(), peer=PeerSettings(max_memory_mb=200), placement=PlacementSettings(kv_tokens=8))
ME = Identity.ephemeral()
OLD, NEW = LayerRange(2, 6), LayerRange(10, 14)


@dataclass
class Table:
    budget: KVBudget


@dataclass
class Service:
    table: Table


@dataclass
class View:
    known: list[Announcement] = field(default_factory=list)
    news: list[Announcement] = field(default_factory=list)
    """Not read yet; they take the place of what the same peers said before."""

    async def refresh(self) -> list[Announcement]:
        said = {a.peer.peer_id: a for a in (*self.known, *self.news)}
        self.known = list(said.values())
        return self.known

    def announcements(self) -> list[Announcement]:
        return self.known

    def check(self, announcement: Announcement) -> str | None:
        return None


@dataclass
class Announcer:
    said: list[Announcement] = field(default_factory=list)

    async def update(self, announcement: Announcement) -> bool:
        self.said.append(announcement)
        return True


class Loading(Peer):
    """Loads nothing, at once."""

    def load(self, layers: LayerRange) -> asyncio.Task[Any]:
        async def loaded() -> str:
            return f"shard {layers}"

        return asyncio.create_task(loaded())


def announced(peer: str, layers: LayerRange) -> Announcement:
    return Announcement(
        peer=PeerAddress(PeerId(peer)),
        model=MODEL.model_id,
        layers=layers,
        state=PeerState.SERVING,
        version="0",
        decode_s_per_layer=0.001,
        prefill_s_per_token_layer=0.001,
        kv_tokens_free=100,
    )


class Announced(Tenure):
    """Says that it serves the old range."""

    def announcement(self) -> Announcement:
        return announced(ME.peer_id, OLD)


def peer_among(others: list[Announcement], report: Report = lambda event: None) -> Peer:
    given: dict[str, Any] = {
        "settings": SETTINGS,
        "reference": None,
        "profile": MODEL,
        "files": {},
        "device": None,
        "room": Room.of(SETTINGS, MODEL, 0, on_cpu=True),
        "identity": ME,
        "transport": None,
        "view": View(others),
        "announcer": Announcer(),
        "stopping": Stopping(),
        "report": report,
        "speed": None,
        "dial_back": None,
    }
    return Loading(**given)


async def ahead(
    kv_mb: int, others: list[LayerRange], *, urgent: bool = False, news: Sequence[Announcement] = ()
) -> tuple[bool, Move, KVBudget]:
    """Whether the peer goes, with what it has loaded."""
    budget = KVBudget(kv_mb * MB, 8, "lru")
    peer = peer_among([announced(f"peer{index}", layers) for index, layers in enumerate(others)])
    cast(View, peer.view).news += news
    tenure, move = Announced(peer, OLD, *cast(Any, (None, None, Service(Table(budget))))), Move(NEW, urgent)
    return await tenure._load_ahead(move), move, budget


async def test_the_new_range_is_loaded_beside_the_old_one_where_both_fit() -> None:
    goes, move, budget = await ahead(100, [OLD])
    assert goes
    assert move.loading is not None
    assert move.loading.result() == "shard 10:14"
    assert budget.used_bytes > 40 * MB, "no session gets the memory that the new range has"


async def test_it_is_loaded_after_the_old_one_was_dropped_where_they_do_not() -> None:
    goes, move, budget = await ahead(30, [OLD])
    assert goes
    assert move.loading is None
    assert budget.used_bytes == 0


async def test_a_peer_stays_if_the_others_have_left_its_layers_meanwhile() -> None:
    goes, move, budget = await ahead(100, [LayerRange(2, 5)])
    assert not goes
    assert move.loading is None
    assert budget.used_bytes == 0, "the room is for sessions again"


@pytest.mark.parametrize("kv_mb", [100, 30])
@pytest.mark.parametrize(("name", "stays"), [("0", True), ("z", False)])
async def test_of_two_that_leave_the_same_layers_at_once_one_stays(kv_mb: int, name: str, stays: bool) -> None:
    """Whether the new range fits beside the old one or not. Peer ids begin with 1: the other one's is before or after
    ours, and those with smaller ids go first."""
    going = replace(announced(name, OLD), moving_to=NEW)
    goes, move, budget = await ahead(kv_mb, [], news=[going])
    assert goes is not stays
    assert (move.loading is not None) is (goes and kv_mb == 100)
    assert budget.used_bytes == 0 or goes


@pytest.mark.parametrize("urgent", [False, True])
async def test_a_peer_stays_where_it_is_if_a_better_range_can_not_be_loaded(
    urgent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreachable() -> None:
        raise ModelError("the Hub can't be asked")

    monkeypatch.setattr(Loading, "load", lambda peer, layers: asyncio.create_task(unreachable()))
    if urgent:
        with pytest.raises(ModelError):
            await ahead(100, [OLD], urgent=True)
    else:
        goes, move, budget = await ahead(100, [OLD])
        assert (goes, move.loading, budget.used_bytes) == (False, None, 0)


async def test_a_gap_is_closed_whatever_the_others_do() -> None:
    goes, move, _ = await ahead(100, [], urgent=True)
    assert goes
    assert move.loading is not None


def test_a_peer_tells_when_layers_come_to_be_missing_and_when_none_is_any_more() -> None:
    async def main() -> None:
        told: list[dict[str, object]] = []
        others = [announced("peer1", LayerRange(0, 2)), announced("peer2", LayerRange(6, 30))]
        peer = peer_among(list(others), told.append)
        tenure, view = Announced(peer, OLD, *cast(Any, (None, None, None))), cast(View, peer.view)
        telling = asyncio.create_task(tenure._tell_coverage())
        for known in (others, others[:1], others[:1], others):
            view.known = list(known)
            await asyncio.sleep(2 * SETTINGS.discovery.view_period_s)
        telling.cancel()
        assert [event["complete"] for event in told] == [False, True]
        assert "nobody serves layers 6:30" in str(told[0]["message"])

    run_virtual(main)


async def test_a_load_that_nobody_waits_for_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that takes too long is cancelled, and its memory is for sessions again."""
    began, ended = threading.Event(), threading.Event()

    def load(*arguments: Any) -> None:
        began.set()
        for _ in range(500):
            time.sleep(0.01)
            if arguments[-1]():
                return ended.set()

    monkeypatch.setattr("peers.peer.load_shard", load)
    borrowing = asyncio.create_task(peer_among([]).borrow(LayerRange(3, 4)).__aenter__())
    assert await asyncio.to_thread(began.wait, 5)
    borrowing.cancel()
    assert await asyncio.to_thread(ended.wait, 5)


async def test_a_peer_that_is_told_to_stop_while_it_measures_itself_does_not_finish_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def measured(engine: Engine) -> Speed:
        peer.stopping.asked.set()
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr("peers.tenure.measure", measured)
    peer, shard = peer_among([]), SimpleNamespace(profile=MODEL, layers=OLD, device=torch.device("cpu"))
    async with asyncio.timeout(5):
        assert await serve_range(peer, OLD, cast(Any, shard)) is None


async def test_a_range_that_was_served_holds_no_weights_while_the_next_one_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where both don't fit, its memory is what the next one takes; the network's handlers still lead to it."""

    class Short(Tenure):
        async def run(self, plan: MemoryPlan, weights_bytes: int, measuring_s: float) -> None:
            pass

    async def measured(engine: Engine) -> Speed:
        return Speed(0.001, 0.001)

    monkeypatch.setattr("peers.tenure.measure", measured)
    monkeypatch.setattr("peers.tenure.store_speed", lambda *_: None)
    monkeypatch.setattr("peers.tenure.Tenure", Short)
    peer = peer_among([])
    peer.device = torch.device("cpu")
    peer.transport = cast(Any, SimTransport(SimNetwork(random.Random(1), Faults()).add("peer")))
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    shard = Shard.load(profile_of(config), config.to_dict(), ModelSource(model), LayerRange(0, 2))
    weights = weakref.ref(shard._model)
    assert await serve_range(peer, OLD, shard) is None
    del shard
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize(("offset_s", "told"), [(0.0, None), (300.0, "300 s behind"), (-300.0, "300 s ahead of")])
def test_a_clock_that_differs_from_the_swarms_is_told(
    offset_s: float, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[dict[str, object]] = []
    monkeypatch.setattr(dht_time, "offset_s", offset_s)
    Admission(peer_among([], events.append), OLD)._tell_of_clock()
    assert [event["code"] for event in events] == ([] if told is None else ["clock"])
    assert all(str(told) in str(event["message"]) for event in events)


def test_what_a_single_peer_says_keeps_a_joiner_out_but_ends_none_that_serves() -> None:
    """One stranger could end a healthy first peer."""

    async def main() -> None:
        network = SimNetwork(random.Random(1), Faults())
        stranger, asked = network.add("stranger"), []

        async def refuse(stream: Stream) -> None:
            asked.append(await stream.receive())
            error = error_to_wire(NotAdmitted("its numbers are wrong"))
            await stream.send(pb.InfoReply(error=error).SerializeToString())

        await SimTransport(stranger).serve(INFO, refuse)
        peer = peer_among([announced("stranger", OLD)])
        peer.transport = cast(Any, SimTransport(network.add(ME.peer_id)))
        admission = Admission(peer, OLD)
        with pytest.raises(NotAdmitted, match="its numbers are wrong"):
            await admission.obtain()
        admission.voucher = vouch(ME, ME.peer_id, MODEL.model_id, OLD)
        before = len(asked)
        await admission.obtain()
        assert len(asked) == before + 1
        assert admission.alone, "others are asked again"

    run_virtual(main)
