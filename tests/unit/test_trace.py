"""Where the time went: a trace survives its file, and the explanation adds up."""

from __future__ import annotations

import pytest

from swarm.errors import BadRequest
from swarm.plans import PlannedHop
from swarm.trace import Trace, TracedToken, explain
from swarm.types import Hop, HopTiming, LayerRange, PeerAddress, PeerId

FIRST, SECOND = PeerId("peer-one"), PeerId("peer-two")


def hops(compute_ms: float) -> tuple[HopTiming, ...]:
    return (
        HopTiming(FIRST, LayerRange(0, 4), 0.001, compute_ms / 1e3, 1, 0.002),
        HopTiming(SECOND, LayerRange(4, 8), 0.0, 0.020, 2, 0.030),
    )


def trace(*gaps_ms: float) -> Trace:
    tokens = tuple(TracedToken(index, gap / 1e3, hops(10.0)) for index, gap in enumerate(gaps_ms))
    planned = tuple(
        PlannedHop(
            Hop(PeerAddress(timing.peer_id, ("/ip4/127.0.0.1/tcp/1",)), timing.layers), 0.01, 0.0, 0.0, 0.02, 0.0
        )
        for timing in hops(10.0)
    )
    return Trace("toy@0", 3, tokens, planned)


def test_a_trace_survives_its_file() -> None:
    written = trace(500.0, 70.0, 80.0)
    assert Trace.from_json(written.to_json()) == written


def test_the_explanation_adds_up_and_names_what_dominates() -> None:
    why = explain(trace(500.0, 70.0, 70.0))
    assert why.measured_s == pytest.approx(0.070)
    assert why.elsewhere_s == pytest.approx(0.070 - 0.001 - 0.010 - 0.020 - 0.032)
    assert why.predicted_s == pytest.approx(0.060)
    assert [share.predicted_link_s for share in why.hops] == [0.01, 0.01]
    assert why.predicted_elsewhere_s == 0.0
    assert why.dominant == "the link from er-two to er-one"


def test_waiting_dominates_where_nothing_else_explains_the_time() -> None:
    assert "waiting" in explain(trace(500.0, 700.0, 700.0)).dominant


def test_the_route_of_a_trace_is_that_of_its_last_token() -> None:
    assert [hop.peer.peer_id for hop in trace(500.0, 70.0).route.hops] == [FIRST, SECOND]


def test_a_token_of_a_draft_has_no_hops_of_its_own() -> None:
    known = trace(500.0, 70.0)
    drafted = Trace("toy@0", 3, (*known.tokens, TracedToken(2, 0.0, ())))
    assert drafted.route == known.route


def test_tokens_of_an_older_route_do_not_count() -> None:
    moved = trace(500.0, 70.0, 70.0)
    old = TracedToken(1, 0.5, hops(10.0)[:1])
    mixed = Trace(moved.model, 3, (moved.tokens[0], old, *moved.tokens[1:]), moved.predicted)
    assert explain(mixed).measured_s == pytest.approx(0.070)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": "m"}', "null"])
def test_what_is_no_trace_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        Trace.from_json(text)


def test_a_single_token_explains_nothing() -> None:
    with pytest.raises(BadRequest, match="longer"):
        explain(trace(500.0))
