"""The planner against brute force, and the rules that its routes keep."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import NoRoom, NoRoute
from swarm.link_times import HALF_LIFE_S, Links, LinkTime, links_of
from swarm.planning import usable_layers
from swarm.routing import Demand, Knowledge, Plan, missing_layers, plan, plan_route, price
from swarm.types import (
    LINK_SUFFIX,
    Announcement,
    Hop,
    LayerRange,
    LinkReport,
    ModelId,
    PeerAddress,
    PeerId,
    PeerState,
    Route,
)

LAYERS = 6
WHOLE = LayerRange(0, LAYERS)


def peer(name: str, start: int, end: int, layer_s: float = 0.01, **facts: object) -> Announcement:
    announcement = Announcement(
        peer=PeerAddress(PeerId(name)),
        model=ModelId("toy@0"),
        layers=LayerRange(start, end),
        state=PeerState.SERVING,
        version="0",
        decode_s_per_layer=layer_s,
        prefill_s_per_token_layer=layer_s / 10,
        kv_tokens_free=1000,
    )
    return replace(announcement, **facts)  # type: ignore[arg-type]


def link_table(**seconds: float) -> Links:
    """``a_b=0.01``: from a to b."""
    return Links({(PeerId(n.split("_")[0]), PeerId(n.split("_")[1])): LinkTime(s) for n, s in seconds.items()})


def names(planned: Plan | Route) -> str:
    """``a[0:3] b[3:6]``."""
    hops = [one.hop for one in planned.hops] if isinstance(planned, Plan) else planned.hops
    return " ".join(f"{hop.peer.peer_id}[{hop.layers}]" for hop in hops)


# --- against brute force


def all_routes(
    announcements: list[Announcement], wanted: LayerRange, demand: Demand, used: frozenset[PeerId] = frozenset()
) -> Iterator[list[tuple[Announcement, LayerRange]]]:
    for a in announcements:
        if a.peer.peer_id in used or not a.layers.start <= wanted.start < a.layers.end:
            continue
        for end in range(wanted.start + 1, min(a.layers.end, wanted.end) + 1):
            if end - wanted.start > usable_layers(len(a.layers), a.kv_tokens_free, demand):
                break
            hop = (a, LayerRange(wanted.start, end))
            if end == wanted.end:
                yield [hop]
            else:
                rest = LayerRange(end, wanted.end)
                for others in all_routes(announcements, rest, demand, used | {a.peer.peer_id}):
                    yield [hop, *others]


def cost_of(route: list[tuple[Announcement, LayerRange]], demand: Demand, knowledge: Knowledge, ring: bool) -> float:
    links, sent = knowledge.links, demand.prompt_tokens * demand.activation_bytes / demand.new_tokens
    total = 0.0
    for index, (a, layers) in enumerate(route):
        total += knowledge.hop_s + a.queue_s + a.step_s + knowledge.penalties.get(a.peer.peer_id, 0.0)
        total += a.head_s if index == len(route) - 1 else 0.0
        work_s = a.decode_s_per_layer + a.prefill_s_per_token_layer * demand.prompt_tokens / demand.new_tokens
        total += work_s * len(layers)
        source = route[index - 1][0].peer.peer_id
        target = a.peer.peer_id
        if index > 0:
            total += link_cost(source, target, links, sent)
        elif ring:
            total += link_cost(source, target, links, 0.0)  # tokens go back, no hidden states
    if not ring and knowledge.before and knowledge.after:
        total += link_cost(knowledge.before, route[0][0].peer.peer_id, links, sent)
        total += link_cost(route[-1][0].peer.peer_id, knowledge.after, links, sent)
    return total


def link_cost(source: PeerId, target: PeerId, links: Links, sent: float) -> float:
    """``sent``: bytes for each token."""
    if source == target:
        return 0.0
    return links.seconds(source, target) + links.risk_s(source, target) + sent / links.bytes_per_s(source, target)


@st.composite
def swarms(draw: st.DrawFn, most: int = 6) -> list[Announcement]:
    found = []
    for index in range(draw(st.integers(1, most))):
        start = draw(st.integers(0, LAYERS - 1))
        end = draw(st.integers(start + 1, LAYERS))
        layer_ms = draw(st.integers(1, 20))
        queue_ms = draw(st.sampled_from([0, 0, 0, 5, 40]))
        tokens = draw(st.sampled_from([1000, 1000, 1000, 60, 20]))
        facts: dict[str, object] = {"queue_s": queue_ms / 1e3, "kv_tokens_free": tokens}
        facts["step_s"] = draw(st.sampled_from([0.0, 0.0, 0.003]))
        facts["head_s"] = draw(st.sampled_from([0.0, 0.015])) if end == LAYERS else 0.0
        found.append(peer(f"p{index}", start, end, layer_ms / 1e3, **facts))
    return found


@st.composite
def link_tables(draw: st.DrawFn) -> Links:
    pairs = [(PeerId(f"p{a}"), PeerId(f"p{b}")) for a in range(6) for b in range(6) if a != b]
    measured = draw(st.lists(st.sampled_from(pairs), unique=True))
    times = {pair: LinkTime(draw(st.integers(0, 60)) / 1e3, draw(st.sampled_from([0.0, 0.01]))) for pair in measured}
    return Links(times)


def check_optimal(
    announcements: list[Announcement], demand: Demand, knowledge: Knowledge, ring: bool, within: float = 1.0
) -> None:
    costs = [cost_of(route, demand, knowledge, ring) for route in all_routes(announcements, WHOLE, demand)]
    if not costs:
        with pytest.raises(NoRoute):
            plan(announcements, WHOLE, demand, knowledge, ring=ring)
        return
    found = plan(announcements, WHOLE, demand, knowledge, ring=ring)
    by_id = {a.peer.peer_id: a for a in announcements}
    hops = [(by_id[one.hop.peer.peer_id], one.hop.layers) for one in found.hops]
    assert hops in list(all_routes(announcements, WHOLE, demand)), "a possible route without a repeated peer"
    assert found.cost_s == pytest.approx(cost_of(hops, demand, knowledge, ring))
    assert found.cost_s <= min(costs) * within + 1e-9


@settings(deadline=None, max_examples=150)
@given(swarms(), st.booleans())
def test_best_of_all_routes_with_equal_links(announcements: list[Announcement], ring: bool) -> None:
    check_optimal(announcements, Demand(tokens=50), Knowledge(), ring)


@settings(deadline=None, max_examples=250)
@given(swarms(), link_tables(), st.booleans())
def test_best_of_all_routes_with_random_links(announcements: list[Announcement], links: Links, ring: bool) -> None:
    knowledge = Knowledge(links=links, penalties={PeerId("p1"): 0.2})
    check_optimal(announcements, Demand(tokens=50), knowledge, ring)


@settings(deadline=None, max_examples=100)
@given(swarms(), link_tables())
def test_best_of_all_routes_for_a_long_prompt(announcements: list[Announcement], links: Links) -> None:
    demand = Demand(tokens=10, prompt_tokens=500, new_tokens=20, activation_bytes=4000)
    check_optimal(announcements, demand, Knowledge(links=links), ring=True)


@settings(deadline=None, max_examples=100)
@given(swarms(), link_tables(), st.integers(0, 100))
def test_spreading_the_load_costs_no_more_than_its_share(
    announcements: list[Announcement], links: Links, seed: int
) -> None:
    check_optimal(announcements, Demand(), Knowledge(links=links, seed=seed), ring=True, within=1.03)


@settings(deadline=None, max_examples=100)
@given(swarms(), link_tables(), st.sampled_from(["p2", "p4"]))
def test_best_part_between_two_survivors(announcements: list[Announcement], links: Links, before: str) -> None:
    """Which may have more of these layers themselves."""
    demand = Demand(prompt_tokens=500, new_tokens=20, activation_bytes=4000)
    knowledge = Knowledge(links=links, before=PeerId(before), after=PeerId("p5"))
    check_optimal([a for a in announcements if a.peer.peer_id < "p4"], demand, knowledge, ring=False)


def test_a_neighbour_that_takes_over_a_lost_hop_sends_itself_nothing() -> None:
    """A share of 8 ms a token of the prompt's way outweighs two layers that are slower by 6 ms."""
    demand = Demand(prompt_tokens=500, new_tokens=20, activation_bytes=4000)
    facts = {"prefill_s_per_token_layer": 0.0}
    announcements = [peer("before", 0, 6, 0.012, **facts), peer("spare", 2, 4, 0.009, **facts)]
    knowledge = Knowledge(hop_s=0.0, links=link_table(before_spare=0.0), before=PeerId("before"))
    assert names(plan(announcements, LayerRange(2, 4), demand, knowledge, ring=False)) == "before[2:4]"


@pytest.mark.parametrize("seed", range(4))
def test_a_large_swarm_is_planned_almost_as_well_as_without_leaving_candidates_out(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    announcements = []
    for index in range(400):
        length = rng.choice([4, 6, 8, 12, 20])
        start = rng.randint(0, 32 - length)
        announcements.append(peer(f"p{index}", start, start + length, rng.lognormvariate(-6, 0.7)))
    ids = [a.peer.peer_id for a in announcements]
    pairs = {(rng.choice(ids), rng.choice(ids)): LinkTime(rng.lognormvariate(-3.7, 0.8)) for _ in range(3000)}
    knowledge = Knowledge(links=Links({pair: link for pair, link in pairs.items() if pair[0] != pair[1]}))
    found = plan(announcements, LayerRange(0, 32), knowledge=knowledge)
    monkeypatch.setattr("swarm.planning.MOST_CANDIDATES", 400)
    monkeypatch.setattr("swarm.shortest_path.MOST_STATES", 20_000)
    assert found.cost_s <= 1.05 * plan(announcements, LayerRange(0, 32), knowledge=knowledge).cost_s


# --- single rules


def test_one_peer_wins_over_a_chain_unless_the_chain_is_really_faster() -> None:
    alone = peer("alone", 0, 6, 0.010)
    chain = [peer("a", 0, 3, 0.008), peer("b", 3, 6, 0.008)]
    assert names(plan([alone, *chain], WHOLE)) == "a[0:3] b[3:6]"
    slow = Knowledge(links=link_table(a_b=0.02, b_a=0.02))
    found = plan([alone, *chain], WHOLE, knowledge=slow)
    assert names(found) == "alone[0:6]"
    assert dict(found.left_out).keys() == {"a", "b"}
    assert "slower: at best" in dict(found.left_out)[PeerId("a")]


def test_the_link_that_closes_the_ring_counts() -> None:
    announcements = [peer("a", 0, 3), peer("b", 3, 6), peer("c", 3, 6)]
    links = link_table(a_b=0.001, b_a=0.050, a_c=0.010, c_a=0.010)
    assert names(plan(announcements, WHOLE, knowledge=Knowledge(links=links))) == "a[0:3] c[3:6]"
    assert names(plan(announcements, WHOLE, knowledge=Knowledge(links=links), ring=False)) == "a[0:3] b[3:6]"


def test_time_is_counted_per_layer_used_and_a_hop_leaves_early() -> None:
    announcements = [peer("slow", 0, 5, 0.020), peer("fast", 2, 6, 0.001)]
    found = plan(announcements, WHOLE)
    assert names(found) == "slow[0:2] fast[2:6]"
    assert [one.compute_s for one in found.hops] == pytest.approx([0.040, 0.004])
    assert found.decode_s == pytest.approx(sum(one.decode_s for one in found.hops))


def test_the_head_costs_the_last_peer_only_and_a_step_costs_whatever_its_layers() -> None:
    announcements = [peer("a", 0, 3, step_s=0.002), peer("b", 0, 6, step_s=0.003, head_s=0.1), peer("c", 3, 6, 0.02)]
    found = plan(announcements[:2], WHOLE)
    assert names(found) == "b[0:6]"
    assert found.hops[0].compute_s == pytest.approx(0.003 + 6 * 0.01 + 0.1)
    found = plan(announcements, WHOLE)
    assert names(found) == "b[0:5] c[5:6]", "it may leave before the head"
    assert [one.compute_s for one in found.hops] == pytest.approx([0.003 + 5 * 0.01, 0.02])
    assert found.cost_s < plan(announcements[:2], WHOLE).cost_s
    margin = plan(announcements, WHOLE, knowledge=Knowledge(hop_margin_s=0.1))
    assert names(margin) == "b[0:6]", "another hop has to gain more than the margin"
    assert margin.decode_s == pytest.approx(plan(announcements[:2], WHOLE).decode_s), "which is no part of a prediction"
    assert margin.cost_s == pytest.approx(plan(announcements[:2], WHOLE).cost_s + 0.1)


def test_nobody_is_used_twice() -> None:
    announcements = [peer("ends", 0, 6, 0.010), peer("middle", 2, 4, 0.0001)]
    assert names(plan(announcements, WHOLE, knowledge=Knowledge(hop_s=0.0, links=Links(default_s=0.0)))) == "ends[0:6]"


def test_kv_room_counts_the_layers_that_are_used() -> None:
    announcements = [peer("small", 0, 4, 0.001, kv_tokens_free=100), peer("large", 0, 6, 0.010)]
    assert names(plan(announcements, WHOLE, Demand(tokens=100))) == "small[0:4] large[4:6]"
    assert names(plan(announcements, WHOLE, Demand(tokens=200))) == "small[0:2] large[2:6]"
    found = plan(announcements, WHOLE, Demand(tokens=500))
    assert names(found) == "large[0:6]"
    assert dict(found.left_out) == {"small": "no KV room: 100 tokens are free, 500 are needed"}


def test_peers_that_serve_all_layers_and_have_no_room_are_told_from_layers_that_nobody_serves() -> None:
    announcements = [peer("first", 0, 4, 0.001, kv_tokens_free=100), peer("last", 4, 6, 0.001, kv_tokens_free=9000)]
    reason = r"first \[0:4\]: no KV room: 100 tokens are free, 5000 are needed$"
    with pytest.raises(NoRoom, match=f"^nobody has room for 5000 tokens in layers 0:4: {reason}"):
        plan(announcements, WHOLE, Demand(tokens=5000))
    with pytest.raises(NoRoom, match=r"^no peers with room for 300 tokens form a route over layers 0:6$"):
        plan(announcements, WHOLE, Demand(tokens=300))
    with pytest.raises(NoRoute, match=f"^nobody serves layers 0:4, 5:6, except {reason}") as found:
        plan([announcements[0], peer("last", 4, 5, kv_tokens_free=9000)], WHOLE, Demand(tokens=5000))
    with pytest.raises(NoRoute) as excluded:
        plan(announcements, WHOLE, Demand(tokens=5000), excluded=frozenset({PeerId("last")}))
    assert not any(isinstance(error.value, NoRoom) for error in (found, excluded))


@pytest.mark.parametrize(("peers", "free"), [(4, 30), (5, 26), (12, 20), (30, 26), (200, 45)])
def test_peers_that_have_room_for_a_part_of_their_layers_share_them_out(peers: int, free: int) -> None:
    """However many parts there are to choose from, the fastest peers' are not all that is looked at."""
    announcements = [peer(f"p{index}", 0, 80, 0.001 * (1 + index), kv_tokens_free=free) for index in range(peers)]
    found = plan(announcements, LayerRange(0, 80), Demand(tokens=100))
    assert all(len(one.hop.layers) <= 80 * free // 100 for one in found.hops)
    assert len({one.hop.peer.peer_id for one in found.hops}) == len(found.hops)


def test_in_a_large_swarm_too_a_peer_with_little_room_may_serve_any_of_its_layers() -> None:
    announcements = [peer(f"p{index}", 0, 70, 0.001) for index in range(100)]
    announcements.append(peer("end", 60, 80, 0.001, kv_tokens_free=65))  # enough for 13 of its layers
    last = plan(announcements, LayerRange(0, 80), Demand(tokens=100)).hops[-1].hop
    assert (last.peer.peer_id, last.layers.end) == ("end", 80)


@pytest.mark.parametrize(
    ("free", "tokens", "log_layers", "layers"),
    [(100, 0, 1.5, 4), (100, 100, 1.5, 4), (99, 100, 0.0, 3), (50, 100, 0.0, 2), (50, 100, 1.5, 1), (10, 100, 1.5, 0)],
)
def test_layers_that_the_kv_room_allows(free: int, tokens: int, log_layers: float, layers: int) -> None:
    announcement = peer("p", 0, 4, kv_tokens_free=free)
    assert (
        usable_layers(
            len(announcement.layers), announcement.kv_tokens_free, Demand(tokens=tokens, log_layers=log_layers)
        )
        == layers
    )


def test_queues_and_failures_make_a_peer_slower_and_old_queues_less_so() -> None:
    announcements = [peer("a", 0, 6, queue_s=0.1), peer("b", 0, 6, 0.012)]
    assert names(plan(announcements, WHOLE)) == "b[0:6]"
    assert names(plan(announcements, WHOLE, knowledge=Knowledge(age_s=lambda name: 60.0))) == "a[0:6]"
    failing = Knowledge(penalties={PeerId("b"): 10.0})
    found = plan(announcements, WHOLE, knowledge=failing)
    assert names(found) == "a[0:6]"
    assert dict(found.left_out)[PeerId("b")] == "it failed recently, which counts 10 s a token"
    assert names(plan([announcements[1]], WHOLE, knowledge=failing)) == "b[0:6]", "nobody is banned"


def test_refused_peers_are_named_with_the_reason() -> None:
    announcements = [
        peer("good", 0, 6),
        peer("leaving", 0, 6, state=PeerState.DRAINING),
        peer("weak", 0, 6),
        peer("unwanted", 0, 6),
    ]
    knowledge = Knowledge(check=lambda a: "below the policy" if a.peer.peer_id == "weak" else None)
    found = plan(announcements, WHOLE, knowledge=knowledge, excluded=frozenset({PeerId("unwanted")}))
    assert names(found) == "good[0:6]"
    assert dict(found.left_out) == {
        "leaving": "it is draining",
        "weak": "below the policy",
        "unwanted": "it can't be reached, or is leaving",
    }


def test_no_route_names_the_layers_and_who_was_refused() -> None:
    announcements = [peer("a", 0, 2), peer("b", 3, 6, state=PeerState.DRAINING)]
    with pytest.raises(NoRoute, match=r"nobody serves layers 2:6, except b \[3:6\]: it is draining"):
        plan(announcements, WHOLE)
    with pytest.raises(NoRoute, match="nobody serves layers 0:6"):
        plan([], WHOLE)


def test_equals_are_taken_in_turn_and_a_seed_gives_the_same_plan() -> None:
    announcements = [peer(f"p{index}", 0, 6) for index in range(10)]
    chosen = {seed: names(plan(announcements, WHOLE, knowledge=Knowledge(seed=seed))) for seed in range(100)}
    assert len(set(chosen.values())) == 10
    assert all(chosen[seed] == names(plan(announcements, WHOLE, knowledge=Knowledge(seed=seed))) for seed in chosen)


def test_runners_up_are_other_routes_in_order() -> None:
    announcements = [peer("a", 0, 6, 0.01), peer("b", 0, 6, 0.02), peer("c", 0, 3, 0.001), peer("d", 3, 6, 0.002)]
    found = plan(announcements, WHOLE, runners_up=3)
    assert names(found) == "c[0:3] d[3:6]"
    assert [names(other) for other in found.runners_up] == ["c[0:3] a[3:6]", "a[0:3] d[3:6]"]
    assert found.cost_s <= found.runners_up[0].cost_s <= found.runners_up[1].cost_s


def test_prefill_is_a_pipeline_of_chunks() -> None:
    announcements = [peer("a", 0, 3, prefill_s_per_token_layer=0.001), peer("b", 3, 6, prefill_s_per_token_layer=0.001)]
    knowledge = Knowledge(hop_s=0.0, links=link_table(a_b=0.0, b_a=0.0))
    whole = plan(announcements, WHOLE, Demand(prompt_tokens=128), knowledge)
    assert whole.prefill_s == pytest.approx(128 * 0.006)
    chunked = plan(announcements, WHOLE, Demand(prompt_tokens=1280), knowledge)
    assert chunked.prefill_s == pytest.approx(128 * 0.006 + 1152 * 0.003)


def test_missing_layers() -> None:
    assert missing_layers([LayerRange(1, 2), LayerRange(4, 9)], WHOLE) == [LayerRange(0, 1), LayerRange(2, 4)]
    assert missing_layers([], LayerRange(2, 4)) == [LayerRange(2, 4)]


def test_short_forms() -> None:
    announcements = [peer("a", 0, 3), peer("b", 3, 6), peer("c", 3, 6, 0.02)]
    assert names(plan_route(announcements, LAYERS)) == "a[0:3] b[3:6]"


# --- link times


def test_a_measurement_fades_into_the_estimate_of_both_ends() -> None:
    a, b, c = PeerId("a"), PeerId("b"), PeerId("c")
    times = {(a, b): LinkTime(0.010), (b, c): LinkTime(0.030), (c, a): LinkTime(0.050)}
    links = Links(times, now=0.0)
    assert links.seconds(a, b) == pytest.approx(0.010)
    assert links.usual_s(a) == pytest.approx(0.030)
    assert links.seconds(b, a) == pytest.approx((0.020 + 0.030) / 2)
    assert Links(times, now=HALF_LIFE_S).seconds(a, b) == pytest.approx((0.010 + 0.025) / 2)
    assert links.seconds(a, a) == 0.0


def test_an_unsteady_link_loses_against_a_steady_one() -> None:
    announcements = [peer("a", 0, 3), peer("b", 3, 6), peer("c", 3, 6)]
    a, b, c = PeerId("a"), PeerId("b"), PeerId("c")
    times = {
        (a, b): LinkTime(0.01, jitter_s=0.02),
        (b, a): LinkTime(0.01),
        (a, c): LinkTime(0.012),
        (c, a): LinkTime(0.01),
    }
    found = plan(announcements, WHOLE, knowledge=Knowledge(links=Links(times)))
    assert names(found) == "a[0:3] c[3:6]"
    assert found.hops[1].link_s == pytest.approx(0.012), "a prediction has no allowance for risk"
    assert math.isclose(found.cost_s, found.decode_s)


def test_what_peers_announce_of_links_counts_in_both_directions() -> None:
    a, b, c = (PeerId(f"12D3KooWlongid{name}") for name in "abc")

    def reports(*measured: tuple[PeerId, float]) -> dict[str, object]:
        return {"links": tuple(LinkReport(other[-LINK_SUFFIX:], seconds, 0.001) for other, seconds in measured)}

    one = peer(a, 0, 3, **reports((b, 0.02), (c, 0.03), (PeerId("somebody else"), 9.0)))
    two = peer(b, 3, 6, **reports((a, 0.04), (b, 9.0)))
    links = links_of([one, two, peer(c, 3, 6)])
    assert [links.seconds(*ends) for ends in ((a, b), (b, a), (a, c), (c, a))] == pytest.approx(
        [0.02, 0.04, 0.03, 0.03]
    )
    assert links.risk_s(c, a) > 0
    assert set(links.measured_from(b)) == {a}
    aged = links_of([one, two, peer(c, 3, 6)], age_s=lambda _: HALF_LIFE_S)
    assert aged.seconds(a, b) == pytest.approx((0.02 + aged.height_s(a) + aged.height_s(b)) / 2)


def test_a_long_prompt_goes_round_a_narrow_link_and_a_short_one_takes_it() -> None:
    """Known from what the peer before it announces: of the way there, not of the way back."""
    a, b, c = (PeerId(f"12D3KooWlongid{name}") for name in "abc")
    narrow = LinkReport(b[-LINK_SUFFIX:], 0.001, 0.0, 125e3)
    announcements = [
        peer(a, 0, 3, links=(narrow, LinkReport(c[-LINK_SUFFIX:], 0.02, 0.0))),
        peer(b, 3, 6),
        peer(c, 3, 6),
    ]
    knowledge = Knowledge(links=links_of(announcements, bytes_per_s=1e7))
    assert [knowledge.links.bytes_per_s(*way) for way in ((a, b), (b, a), (a, c))] == [125e3, 1e7, 1e7]
    for prompt_tokens, chosen in ((0, b), (2, b), (1000, c)):
        demand = Demand(prompt_tokens=prompt_tokens, new_tokens=50, activation_bytes=2304)
        assert plan(announcements, WHOLE, demand, knowledge).hops[1].hop.peer.peer_id == chosen


def test_two_peers_with_the_same_end_of_their_ids_are_not_mixed_up() -> None:
    told = peer("teller", 0, 6, links=(LinkReport("same-end", 0.1, 0.0),))
    assert not links_of([told, peer("one same-end", 0, 6), peer("two same-end", 0, 6)]).measured_from(PeerId("teller"))
    assert links_of([told, peer("one same-end", 0, 6)]).measured_from(PeerId("teller"))


def test_an_unmeasured_way_to_a_slow_peer_is_slow() -> None:
    fast, slow = [PeerId(f"f{n}") for n in range(6)], PeerId("slow")
    times = {(one, other): LinkTime(0.001) for one in fast for other in fast if one != other}
    links = Links(times | {(fast[0], slow): LinkTime(0.05)})
    assert links.seconds(slow, fast[1]) == pytest.approx(0.05, rel=0.05)
    assert links.seconds(fast[1], PeerId("new")) == pytest.approx(0.001)


def test_the_price_of_a_route_is_that_of_its_own_hops() -> None:
    announcements = [
        peer("a", 0, 4, 0.02, step_s=0.001),
        peer("b", 2, 6, 0.03, head_s=0.05, state=PeerState.DRAINING),
        peer("fast", 0, 6, 0.001),
    ]
    links = link_table(a_b=0.02, b_a=0.03)
    hops = tuple(
        Hop(a.peer, layers) for a, layers in zip(announcements, (LayerRange(0, 3), LayerRange(3, 6)), strict=False)
    )
    priced = price(announcements, Route(hops), knowledge=Knowledge(links=links, hop_s=0.002, seed=1))
    assert names(priced) == "a[0:3] b[3:6]"
    assert priced.decode_s == pytest.approx(0.061 + 0.14 + 0.05 + 2 * 0.002)
    with pytest.raises(NoRoute):
        price(announcements[:1], Route(hops))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 9)), max_size=40))
def test_links_of_many_reports_are_what_one_by_one_gives(reports: list[tuple[int, int, int]]) -> None:
    ids = [PeerId(f"peer{index:0{LINK_SUFFIX}}") for index in range(7)]  # nobody has announced the last one
    told = {a: [LinkReport(ids[b][-LINK_SUFFIX:], ms / 1e3, 0.0) for x, b, ms in reports if ids[x] == a] for a in ids}
    found = links_of([replace(peer(name, 0, 6), links=tuple(told[name])) for name in ids[:6]], default_s=0.5)
    times = {(ids[a], ids[b]): ms / 1e3 for a, b, ms in reports if a != b and b < 6}
    times = {(b, a): seconds for (a, b), seconds in times.items()} | times
    for name in ids:
        ways = {other: seconds for (source, other), seconds in times.items() if source == name}
        assert {other: link.seconds for other, link in found.measured_from(name).items()} == ways
        touching = [seconds for pair, seconds in times.items() if name in pair]
        if touching:
            assert found.usual_s(name) == statistics.median(touching)
    if not times:
        assert found.default_s == 0.5
