"""Plans for swarms that don't exist: without a peer, with a copy of one, with one of any description."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swarm.commands.why import sentence
from swarm.errors import BadRequest, WrongRange
from swarm.link_times import Links, LinkTime
from swarm.plans import Demand, Knowledge
from swarm.routing import plan
from swarm.types import Announcement, LayerRange, ModelId, PeerAddress, PeerId, PeerState
from swarm.what_if import add_peer, alternatives, named

LAYERS = 6
WHOLE = LayerRange(0, LAYERS)


def peer(name: str, layers: str, **facts: object) -> Announcement:
    plain = Announcement(
        peer=PeerAddress(PeerId(f"12D3KooW-{name}")),
        model=ModelId("toy@0"),
        layers=LayerRange.parse(layers),
        state=PeerState.SERVING,
        version="0",
        decode_s_per_layer=0.01,
        prefill_s_per_token_layer=0.001,
        kv_tokens_free=1000,
    )
    return replace(plain, **facts)  # type: ignore[arg-type]


FIRST, BUSY, LAST = peer("first", "0:3"), peer("busy", "3:6", queue_s=0.5), peer("last", "3:6", decode_s_per_layer=0.05)
NAMES = [a.peer.peer_id for a in (FIRST, BUSY, LAST)]
KNOWN = Knowledge(
    links=Links({(one, other): LinkTime(0.001) for one in NAMES for other in NAMES if one != other}),
    check=lambda a: None if a.peer.peer_id in NAMES else "nobody has vouched for its layers",
)


def test_dropping_a_peer_and_adding_a_copy() -> None:
    announcements = [FIRST, BUSY]
    route = plan(announcements, WHOLE, knowledge=KNOWN).route
    known = replace(KNOWN, check=lambda announcement: None)
    found = {(one.change, one.peer_id): one for one in alternatives(announcements, route, LAYERS, Demand(), known)}
    lost = found["without", NAMES[0]]
    assert lost.decode_s is None
    assert lost.note == "nobody serves layers 0:3"
    whole_s = plan(announcements, WHOLE, knowledge=known).decode_s
    assert found["copy", NAMES[1]].decode_s == pytest.approx(whole_s - 0.5, abs=1e-6), "the copy has no queue"
    assert found["copy", NAMES[0]].decode_s == pytest.approx(whole_s)
    found = {
        (one.change, one.peer_id): one for one in alternatives([*announcements, LAST], route, LAYERS, Demand(), known)
    }
    assert found["without", NAMES[1]].decode_s == pytest.approx(0.03 + 0.15 + 2 * 0.001 + 2 * known.hop_s)


def test_an_added_peer_is_planned_with() -> None:
    announcements, knowledge = add_peer([FIRST, LAST], KNOWN, "3:6@12ms/1ms", LAYERS)
    found = plan(announcements, WHOLE, knowledge=knowledge)
    assert [hop.layers for hop in found.route.hops] == [LayerRange(0, 3), LayerRange(3, 6)]
    assert found.hops[1].compute_s == pytest.approx(0.003)
    assert [hop.link_s for hop in found.hops] == pytest.approx([0.012, 0.012])
    announcements, knowledge = add_peer(announcements, knowledge, "0:6", LAYERS)
    assert len({a.peer.peer_id for a in announcements}) == 4
    assert announcements[-1].decode_s_per_layer == pytest.approx(0.01), "as fast as the middle"


def test_a_peer_of_the_route_that_has_gone_since_is_told() -> None:
    route = plan([FIRST, BUSY], WHOLE, knowledge=KNOWN).route
    found = alternatives([FIRST, LAST], route, LAYERS, Demand(), KNOWN)
    assert [(one.change, one.peer_id) for one in found][-1] == ("gone", NAMES[1])
    assert sentence(found[-1]).endswith("is not in this swarm any more")


def test_added_peers_are_told_apart_and_have_layers_of_the_model() -> None:
    announcements, knowledge = add_peer([FIRST], KNOWN, "3:6@5ms", LAYERS)
    announcements, knowledge = add_peer(announcements, knowledge, "3:6@5ms", LAYERS)
    assert [a.peer.peer_id for a in announcements[1:]] == ["added 3:6@5ms", "added 3:6@5ms (2)"]
    with pytest.raises(WrongRange, match="the model's are 0:6"):
        add_peer([FIRST], KNOWN, "3:7", LAYERS)


def test_an_added_last_peer_has_a_head() -> None:
    announcements, _ = add_peer([FIRST, replace(LAST, head_s=0.2, step_s=0.1)], KNOWN, "3:6", LAYERS)
    assert announcements[-1].head_s == pytest.approx(0.2)
    assert add_peer([FIRST, replace(LAST, head_s=0.2)], KNOWN, "0:5", LAYERS)[0][-1].head_s == 0.0


@pytest.mark.parametrize("spec", ["", "3", "3:6@", "3:6@12", "3:6@12s", "3:6@-1ms", "3:6/x", "a:b", "3:6@1ms/2ms/3ms"])
def test_what_describes_no_peer_is_refused(spec: str) -> None:
    with pytest.raises(BadRequest, match="START:END"):
        add_peer([FIRST], KNOWN, spec, LAYERS)


def test_an_empty_range_or_an_empty_swarm_is_refused() -> None:
    with pytest.raises(WrongRange):
        add_peer([FIRST], KNOWN, "6:3", LAYERS)
    with pytest.raises(BadRequest, match="nobody is announced"):
        add_peer([], KNOWN, "0:6", LAYERS)


def test_a_peer_is_named_by_the_end_of_its_id() -> None:
    assert named([FIRST, BUSY], "first") == NAMES[0]
    assert named([FIRST, BUSY], NAMES[1]) == NAMES[1]
    for name in ("nobody", "st"):
        with pytest.raises(BadRequest):
            named([FIRST, BUSY], name)
    with pytest.raises(BadRequest, match="2 peers"):
        named([peer("same", "0:3"), peer("also-same", "0:3")], "same")
