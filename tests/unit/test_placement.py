"""Choosing a range, together with others that join; moving; memory; policy; what is missing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peers.memory import MB, Demands, capacity_layers, capacity_of, least_bytes, plan_memory
from peers.placement import (
    Holder,
    Spare,
    Strength,
    arrange,
    choose_range,
    fill_gaps,
    standing,
    weakest,
    windows,
)
from peers.rebalance import Mover, close_gaps, may_drop, should_move, tolerable
from peers.seat import no_layer_fits
from swarm.admission import check_announcement, require
from swarm.config import PlacementSettings, PolicySettings
from swarm.coverage import coverage_of, missing_layers, weights_bytes
from swarm.errors import NotAdmitted
from swarm.models import ModelProfile
from swarm.types import Announcement, Capacity, LayerRange, ModelId, PeerAddress, PeerId, PeerState, Voucher

LAYERS = 30
WHOLE = LayerRange(0, LAYERS)
EIGHT = Capacity(8, 8, 8)
SETTINGS = PlacementSettings()
PROFILE = ModelProfile(
    model_id=ModelId("toy@0"),
    name="toy",
    architecture="toy",
    num_layers=LAYERS,
    hidden_size=100,
    vocab_size=1000,
    num_kv_heads=2,
    head_dim=50,
    max_positions=512,
    dtype="float32",
    end_ids=(),
    layer_bytes=1_000_000,
    embedding_bytes=3_000_000,
    head_bytes=3_000_000,
    tied=True,
)


def ranges(text: str) -> list[LayerRange]:
    return [LayerRange.parse(part) for part in text.split()]


def peer(name: str, layers: str, **facts: object) -> Announcement:
    announcement = Announcement(
        peer=PeerAddress(PeerId(name)),
        model=PROFILE.model_id,
        layers=LayerRange.parse(layers),
        state=PeerState.SERVING,
        version="0",
        decode_s_per_layer=0.01,
        prefill_s_per_token_layer=0.001,
        kv_tokens_free=1000,
        capacity=EIGHT,
    )
    return replace(announcement, **facts)  # type: ignore[arg-type]


def joiner(name: str, capacity: Capacity = EIGHT) -> Announcement:
    return peer(name, "0:1", state=PeerState.JOINING, capacity=capacity)


def is_covered(served: list[LayerRange]) -> bool:
    return not missing_layers(served, WHOLE)


# --- choosing


def test_six_that_join_at_once_cover_thirty_layers_with_eight_each() -> None:
    joiners = [joiner(f"p{index}") for index in range(6)]
    chosen = [choose_range(joiners, me, LAYERS, SETTINGS) for me in joiners]
    assert all(layers is not None and len(layers) == 8 for layers in chosen)
    assert is_covered([layers for layers in chosen if layers])


def test_six_with_little_room_beside_the_tables_cover_thirty_layers() -> None:
    joiners = [joiner(f"p{index}", Capacity(8, 2, 2)) for index in range(6)]
    chosen = [choose_range(joiners, me, LAYERS, SETTINGS) for me in joiners]
    assert is_covered([layers for layers in chosen if layers])


@pytest.mark.parametrize("seed", range(20))
def test_ten_that_join_at_once_do_not_collide(seed: int) -> None:
    """Everybody sees all joiners, in any order: nobody takes what another needs, and the result is balanced."""
    rng = random.Random(seed)
    joiners = [joiner(f"p{index}", Capacity(6, 4, 4)) for index in range(10)]
    serving = [peer("old", "0:4"), peer("older", "20:26")]
    chosen = []
    for me in joiners:
        seen = [*serving, *joiners]
        rng.shuffle(seen)
        layers = choose_range(seen, me, LAYERS, SETTINGS)
        assert layers is not None
        chosen.append(layers)
    served = [*chosen, *(a.layers for a in serving)]
    assert is_covered(served)
    coverage = coverage_of(served, PROFILE)
    assert min(coverage.counts) >= 1
    assert max(coverage.counts) <= 4


@pytest.mark.parametrize("seed", range(10))
def test_ten_that_join_one_after_the_other_see_each_others_leases(seed: int) -> None:
    rng = random.Random(seed)
    seen: list[Announcement] = []
    for index in range(10):
        layers = choose_range(seen, joiner(f"{rng.random()}"), LAYERS, SETTINGS)
        assert layers is not None
        seen.append(peer(f"p{index}", str(layers), state=PeerState.JOINING, moving_to=layers))
    assert is_covered([a.layers for a in seen])
    assert min(coverage_of([a.layers for a in seen], PROFILE).counts) >= 2


def test_an_old_lease_counts_less_and_then_not() -> None:
    lease = peer("slow", "0:8", state=PeerState.JOINING, moving_to=LayerRange(0, 8))
    fresh = standing([lease], LAYERS, SETTINGS)
    old = standing([lease], LAYERS, SETTINGS, lambda name: SETTINGS.lease_s)
    dead = standing([lease], LAYERS, SETTINGS, lambda name: 3 * SETTINGS.lease_s)
    assert old.strength.rates[0] == pytest.approx(fresh.strength.rates[0] / 2)
    assert old.served == (LayerRange(0, 8),)
    assert dead.served == ()


def test_the_weakest_window_is_taken_and_a_layer_that_hangs_on_one_peer_counts_as_weak() -> None:
    assert weakest([3, 1, 1, 2, 2], ranges("0:2 1:3 3:5")) == LayerRange(1, 3)
    assert weakest([1, 9, 1, 2, 5], ranges("0:2 2:4")) == LayerRange(2, 4)
    assert weakest([1.0], []) is None
    strength = Strength((2.0, 9.0, 2.0, 2.0), (3, 1, 3, 3))
    assert strength.secured == (2.0, 0.0, 2.0, 2.0)
    assert Strength((2.0, 9.0), (2, 1)).secured == (2.0, 9.0), "not enough peers for two everywhere"


def test_a_false_speed_counts_within_reason() -> None:
    honest = [peer(f"p{index}", "0:8") for index in range(5)]
    liar = peer("liar", "8:16", decode_s_per_layer=1e-9)
    strength = standing([*honest, liar], LAYERS, SETTINGS).strength
    assert strength.rates[8] == pytest.approx(8 * strength.rates[0] / 5)


def test_windows_keep_room_for_the_tables() -> None:
    found = windows(Capacity(8, 3, 2), LAYERS)
    assert found[0] == LayerRange(0, 3)
    assert LayerRange(1, 9) in found
    assert found[-2:] == ranges("21:29 28:30")
    assert windows(Capacity(40, 40, 40, whole=True), LAYERS)[0] == WHOLE
    assert windows(Capacity(8, 0, 0), LAYERS)[0].start == 1


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 29), st.integers(1, 10)), max_size=5),
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), max_size=12),
)
def test_gaps_are_filled_by_ranges_that_fit(held: list[tuple[int, int]], sizes: list[tuple[int, int]]) -> None:
    served = [LayerRange(start, min(LAYERS, start + length)) for start, length in held]
    spares = [
        Spare(PeerId(f"p{index}"), Capacity(size, max(0, size - less), max(0, size - less)), 1.0)
        for index, (size, less) in enumerate(sizes)
    ]
    placed = fill_gaps(served, spares, LAYERS)
    for spare in spares:
        layers = placed.get(spare.peer_id)
        assert layers is None or spare.capacity.fits(layers, LAYERS)
    if len(placed) < len(spares) and all(spare.capacity.last for spare in spares):
        assert is_covered([*served, *placed.values()]), "nobody idle while layers are missing"
    strength = Strength((0.0,) * LAYERS, (0,) * LAYERS)
    everybody, _ = arrange(strength, served, spares)
    assert set(missing_layers(everybody.values(), WHOLE)) <= {WHOLE} or len(everybody) > 0 or not spares


# --- whatever could be covered is covered


def could_cover(capacities: list[Capacity], num_layers: int) -> bool:
    """Whether each of them can be given a range so that no layer is missing: by all orders from left to right."""
    reached = [0] * (1 << len(capacities))
    for used in range(1, len(reached)):
        for index, capacity in enumerate(capacities):
            start = reached[used ^ (1 << index)] if used >> index & 1 else num_layers
            end = capacity.end_from(start, num_layers) if start < num_layers else start
            reached[used] = max(reached[used], end if used >> index & 1 else 0)
    return reached[-1] >= num_layers


def of_sizes(text: str) -> list[Capacity]:
    """``3,0,2``: in the middle, from the first layer, to the last."""
    return [Capacity(*map(int, part.split(","))) for part in text.split()]


def random_sizes(rng: random.Random, num_layers: int) -> list[Capacity]:
    """Of peers that have, together, about the room that the model takes, and less of it at both ends."""
    peers, embedding, head, scale = rng.randint(1, 6), rng.randint(0, 3), rng.randint(0, 4), rng.uniform(1.0, 2.0)
    share = scale * num_layers / peers
    sizes = [min(num_layers - 2, round(share * rng.choice([0.3, 0.6, 1.0, 1.0, 1.5]))) for _ in range(peers)]
    return [Capacity(size, max(0, size - embedding), max(0, size - head)) for size in sizes]


SOLE_EMBEDDERS = [
    "3,0,3 1,0,1 1,0,1 3,0,3 5,2,5 2,0,2",
    "3,0,2 3,0,2 5,2,4 2,0,1 3,0,2",
    "3,0,1 1,0,0 3,0,1 3,0,1 3,0,1 4,1,2",
]


@pytest.mark.parametrize("sizes", SOLE_EMBEDDERS)
def test_who_alone_has_room_for_the_embedding_does_not_take_the_head(sizes: str) -> None:
    check_that_joiners_cover(of_sizes(sizes), 12)


def test_joiners_of_any_sizes_cover_whatever_they_could_cover() -> None:
    rng = random.Random(1)
    for _ in range(500):
        check_that_joiners_cover(random_sizes(rng, 12), 12)


def check_that_joiners_cover(capacities: list[Capacity], num_layers: int) -> None:
    spares = [Spare(PeerId(f"p{index}"), capacity, 1.0) for index, capacity in enumerate(capacities)]
    placed, _ = arrange(Strength((0.0,) * num_layers, (0,) * num_layers), [], spares)
    assert all(spare.capacity.fits(placed[spare.peer_id], num_layers) for spare in spares if spare.peer_id in placed)
    if could_cover(capacities, num_layers):
        assert not missing_layers(placed.values(), LayerRange(0, num_layers)), capacities


def test_peers_of_any_sizes_that_could_cover_all_layers_come_to_do_so_from_wherever_they_are() -> None:
    """Though not all of those move at once who should, and what is loading is not asked to move again."""
    rng, num_layers = random.Random(1), 12
    for _ in range(500):
        capacities = random_sizes(rng, num_layers)
        placed = {i: rng.choice(found) for i, one in enumerate(capacities) if (found := windows(one, num_layers))}
        loading: dict[int, int] = {}
        for _ in range(40):
            loading = {index: left - 1 for index, left in loading.items() if left}
            now = [
                Holder(PeerId(f"{index}"), layers, Capacity(0, 0, 0) if index in loading else capacities[index])
                for index, layers in placed.items()
            ]
            moves = {int(peer): layers for peer, layers in close_gaps(now, num_layers).items() if rng.random() < 0.5}
            assert all(capacities[index].fits(layers, num_layers) for index, layers in moves.items())
            placed |= moves
            loading |= {index: rng.randint(0, 3) for index in moves}
        if could_cover(capacities, num_layers):
            assert not missing_layers(placed.values(), LayerRange(0, num_layers)), capacities


# --- closing gaps


@pytest.mark.parametrize(
    ("held", "moving"),
    [
        ("0:8 8:16 16:24 22:30", 0),
        ("0:8 8:16 22:30 0:8", 1),
        ("0:8 8:16 16:24 16:24", 1),
        ("0:8 6:14 18:26 22:30", 1),  # nobody is free: one shifts
        ("6:14 12:20 18:26 22:30", 3),
        ("0:8 8:16 16:24", 0),  # no room
    ],
)
def test_who_moves_when_layers_are_missing(held: str, moving: int) -> None:
    holders = [Holder(PeerId(f"p{index}"), layers, EIGHT) for index, layers in enumerate(ranges(held))]
    moves = close_gaps(holders, LAYERS)
    assert len(moves) == moving
    after = [moves.get(one.peer_id, one.layers) for one in holders]
    assert is_covered(after) == (len(holders) > 3)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 22), st.integers(1, 8)), min_size=4, max_size=9), st.booleans())
def test_every_gap_is_closed_that_the_capacity_suffices_for(held: list[tuple[int, int]], narrow: bool) -> None:
    capacity = Capacity(8, 6, 6) if narrow else EIGHT
    holders = [
        Holder(PeerId(f"p{index}"), LayerRange(start, start + length), capacity)
        for index, (start, length) in enumerate(held)
    ]
    before = [one.layers for one in holders]
    moves = close_gaps(holders, LAYERS)
    after = [moves.get(one.peer_id, one.layers) for one in holders]
    room = 8 * len(holders) - (4 if narrow else 0)
    if room >= LAYERS + 1:
        assert is_covered(after)
    if is_covered(before):
        assert moves == {}
    assert all(capacity.fits(layers, LAYERS) for layers in moves.values())


def test_who_is_loading_already_is_not_asked_again() -> None:
    seen = standing(
        [
            peer("a", "0:8"),
            peer("b", "8:16"),
            peer("c", "8:16", moving_to=LayerRange(16, 24)),
            peer("d", "22:30"),
        ],
        LAYERS,
        SETTINGS,
    )
    assert close_gaps(seen.holders, LAYERS) == {}


# --- moving


def test_moving_for_balance_needs_a_reason_and_never_leaves_a_layer_bare() -> None:
    strength = Strength((8.0,) * 10 + (1.0,) * 20, (80,) * 10 + (20,) * 20)
    me = Mover(LayerRange(0, 8), EIGHT, 8.0, moved_at=0.0)
    target = should_move(me, strength, SETTINGS, now=1000.0, luck=0.0)
    assert target is not None
    assert target.start >= 10
    assert should_move(me, strength, SETTINGS, now=100.0, luck=0.0) is None, "cooldown"
    assert should_move(me, strength, SETTINGS, now=1000.0, luck=0.9) is None, "not all of them at once"
    even = Strength((5.0,) * LAYERS, (5,) * LAYERS)
    assert should_move(me, even, SETTINGS, now=1000.0, luck=0.0) is None
    alone = replace(strength, servers=(1,) * 10 + (20,) * 20)
    assert should_move(me, alone, SETTINGS, now=1000.0, luck=0.0) is None


def test_a_swarm_of_few_large_peers_is_content_with_less() -> None:
    assert tolerable(Strength((1.0,) * 4, (2,) * 4), SETTINGS) == 0.0
    assert tolerable(Strength((1.0,) * 4, (200,) * 4), SETTINGS) == pytest.approx(0.905)


def test_nobody_wants_to_move_back() -> None:
    rng = random.Random(1)
    for _ in range(200):
        rates = [rng.uniform(1.0, 9.0) for _ in range(LAYERS)]
        strength = Strength(tuple(rates), (9,) * LAYERS)
        start = rng.randint(0, LAYERS - 8)
        me = Mover(LayerRange(start, start + 8), EIGHT, 4.0, moved_at=0.0)
        target = should_move(me, strength, SETTINGS, now=1000.0, luck=0.0)
        if target is not None:
            after = strength.plus(me.layers, -me.rate).plus(target, me.rate)
            assert should_move(replace(me, layers=target), after, SETTINGS, now=1000.0, luck=0.0) is None


def test_before_an_old_range_is_dropped_the_others_are_counted_once_more() -> None:
    old, new = LayerRange(0, 8), LayerRange(8, 16)
    stays, leaves = peer("b", "0:8"), peer("b", "0:8", moving_to=LayerRange(8, 16))
    assert may_drop([stays], PeerId("a"), old, new)
    assert may_drop([stays], PeerId("c"), old, new)
    assert may_drop([leaves], PeerId("a"), old, new), "the smaller id goes first"
    assert not may_drop([leaves], PeerId("c"), old, new)
    assert not may_drop([], PeerId("a"), old, new)
    assert may_drop([], PeerId("a"), old, LayerRange(0, 9)), "nothing is given up"
    assert not may_drop([peer("b", "0:8", state=PeerState.DRAINING)], PeerId("a"), old, new)


# --- memory


def test_how_memory_is_divided() -> None:
    demands = Demands(kv_tokens=2000, margin=0.1, batch_tokens=10, logits_rows=5)
    plan = plan_memory(20_000_000, PROFILE, LayerRange(0, 8), demands)
    assert plan.weights_bytes == 11_000_000
    assert plan.margin_bytes == 2_000_000
    assert plan.token_bytes == 8 * 800 + 400
    assert plan.given_bytes == plan.margin_bytes + plan.weights_bytes + plan.buffers_bytes + plan.kv_bytes
    assert plan.fits is False
    assert plan.kv_tokens == plan.kv_bytes // plan.token_bytes
    assert "layers 0:8 in 20 MB: at most 11 weights" in plan.sentence()
    assert plan.in_mb()["weights_mb"] == 11.0
    assert weights_bytes(PROFILE, WHOLE) == 30_000_000 + 3_000_000, "a tied table once"
    last = plan_memory(20_000_000, PROFILE, LayerRange(28, 30), demands)
    assert last.token_bytes == 2 * 800, "the last stage keeps no log"


@pytest.mark.parametrize("given_mb", [0, 1, 5, 13, 20, 60, 200])
def test_capacity_is_the_most_that_fits(given_mb: int) -> None:
    demands = Demands(kv_tokens=500, margin=0.1, batch_tokens=64)
    given_bytes = given_mb * 1_000_000
    capacity = capacity_of(given_bytes, PROFILE, demands)

    def fits(start: int, end: int) -> bool:
        return plan_memory(given_bytes, PROFILE, LayerRange(start, end), demands).fits

    assert capacity.middle == max((n for n in range(1, LAYERS - 1) if fits(1, 1 + n)), default=0)
    assert capacity.first == max((n for n in range(1, LAYERS) if fits(0, n)), default=0)
    assert capacity.last == max((n for n in range(1, LAYERS) if fits(LAYERS - n, LAYERS)), default=0)
    assert capacity.whole == fits(0, LAYERS)
    assert capacity_layers(given_bytes, PROFILE, demands, has_first=True) == capacity.first
    needed = least_bytes(PROFILE, LayerRange(3, 5), demands)
    assert plan_memory(needed, PROFILE, LayerRange(3, 5), demands).fits
    assert not plan_memory(needed - 100, PROFILE, LayerRange(3, 5), demands).fits


# --- policy and coverage


def test_the_policy_refuses_with_a_reason() -> None:
    policy = PolicySettings(min_memory_mb=8000, min_compute_gflops=50.0, gpu_required=True)
    require(policy, 8000, 50.0, True)
    with pytest.raises(NotAdmitted, match=r"this machine gives 4000 MB of memory, this swarm asks for 8000"):
        require(policy, 4000, 100.0, True)
    voucher = Voucher(PeerId("v"), 0.0, b"")
    small = peer("a", "0:8", memory_mb=9000, gflops=49.0, gpu=True, voucher=voucher)
    assert (
        check_announcement(policy, small) == "it computes 49 GFLOPS, this swarm asks for 50 (policy.min_compute_gflops)"
    )
    no_gpu = replace(small, gflops=60.0, gpu=False)
    assert check_announcement(policy, no_gpu) == "it has no GPU, this swarm asks for one (policy.gpu_required)"
    assert check_announcement(PolicySettings(), peer("a", "0:8", voucher=voucher)) is None
    assert check_announcement(PolicySettings(), peer("a", "0:8")) == "nobody has vouched for its layers"


def test_an_embedding_that_stays_in_the_file_takes_no_memory_unless_it_is_the_head_too() -> None:
    kept = Demands(kv_tokens=10, margin=0.1, batch_tokens=10)
    in_file = replace(kept, embedding_in_file=True)

    def weights(layers: str, demands: Demands) -> int:
        return plan_memory(50_000_000, PROFILE, LayerRange.parse(layers), demands).weights_bytes

    assert weights("0:8", kept) - weights("0:8", in_file) == PROFILE.embedding_bytes
    assert weights("8:16", kept) == weights("8:16", in_file)
    assert weights("0:30", kept) == weights("0:30", in_file), "tied: the table is the head"


def test_where_not_one_layer_fits_it_is_said_how_much_one_needs() -> None:
    demands = Demands(kv_tokens=500, margin=0.1, batch_tokens=64)
    told = no_layer_fits(PROFILE, demands).message
    needed = int(told.removesuffix(" MB").rsplit(" ", 1)[1])
    assert capacity_of(needed * MB, PROFILE, demands).middle == 1
    assert capacity_of((needed - 1) * MB, PROFILE, demands).middle == 0


def test_what_is_missing_is_said_in_one_sentence() -> None:
    built_in = replace(PROFILE, name="smollm2-135m")
    coverage = coverage_of(ranges("0:8 4:10 20:29"), built_in)
    assert coverage.missing == (LayerRange(10, 20), LayerRange(29, 30))
    assert coverage.missing_bytes == 10_000_000 + 1_000_000 + 3_000_000
    assert coverage.counts[4:10] == (2, 2, 2, 2, 1, 1)
    assert coverage.sentence() == (
        "nobody serves layers 10:20, 29:30: 11 of 30 layers, 14 MB of weights; "
        "a peer started with --layers 10:20, or with --layers auto, would help"
    )
    stored = coverage_of(ranges("0:10"), replace(built_in, dtype="bfloat16", weights="int4")).sentence()
    flags = "--dtype bfloat16 --weights int4"
    assert stored.endswith(f"started with {flags} --layers 10:30, or with {flags} --layers auto, would help"), (
        "one without them would serve another model"
    )
    assert (
        coverage_of(ranges("0:10"), PROFILE)
        .sentence()
        .endswith(
            "started with --model REF --layers 10:30, or with --model REF --layers auto, would help "
            "(REF: the folder, .gguf file or Hub id of toy)"
        )
    )
    assert coverage_of([WHOLE], PROFILE).sentence() == "all 30 layers are served, by 1 peer"
