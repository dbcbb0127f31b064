"""``swarm why`` and ``swarm plan`` as a user sees them, without a swarm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swarm.commands.app import app
from swarm.commands.plan import as_event, rendered
from swarm.commands.why import sentence
from swarm.config import Settings
from swarm.routing import plan
from swarm.trace import Trace, TracedToken
from swarm.types import Announcement, HopTiming, LayerRange, ModelId, PeerAddress, PeerId, PeerState
from swarm.what_if import Alternative

NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWJVPHZ7cXowpf1SihCL5hRdiWtppSv7xETwVwnW2P285F"
ONE, OTHER = PeerId("12D3KooW-one"), PeerId("12D3KooW-other")


@pytest.fixture
def trace_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SWARM_INITIAL_PEERS", raising=False)
    hops = (
        HopTiming(ONE, LayerRange(0, 4), 0.001, 0.010, 1, 0.002),
        HopTiming(OTHER, LayerRange(4, 8), 0.0, 0.030, 1, 0.001),
    )
    file = tmp_path / "trace.json"
    file.write_text(Trace("toy@0", 3, tuple(TracedToken(n, 0.05, hops) for n in range(4))).to_json())
    return file


def test_why_tells_where_the_time_went_and_exports(trace_file: Path, tmp_path: Path) -> None:
    exported = tmp_path / "chrome.json"
    command = ["why", "--trace", str(trace_file), "--export", str(exported), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    event = json.loads(result.stdout)
    assert event["dominant"] == "the layers of hop 1 (-other)"
    assert [hop["layers"] for hop in event["hops"]] == [[0, 4], [4, 8]]
    assert event["alternatives"] == [], "nobody was asked"
    assert json.loads(exported.read_text())
    refused = CliRunner().invoke(app, ["why", "--trace", str(exported)])
    assert refused.exit_code == 2
    assert "no trace as swarm generate --trace FILE writes it, but one exported for ui.perfetto.dev" in refused.stderr
    plain = CliRunner().invoke(app, ["why", "--trace", str(trace_file)])
    assert "measured 50.0 ms a token" in plain.stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_why_answers_before_it_says_that_the_swarm_is_gone(trace_file: Path, as_json: bool) -> None:
    command = ["why", "--trace", str(trace_file), "--initial-peers", NOBODY, *["--json"] * as_json]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 4
    assert "the initial peer has not answered" in result.stderr
    if as_json:
        answer, error = map(json.loads, result.stdout.splitlines())
        assert (answer["event"], answer["alternatives"], error["code"]) == ("why", [], "unreachable")
    else:
        assert "measured 50.0 ms a token" in result.stdout


def test_why_without_a_trace_is_an_event_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for command in (["why", "--json"], ["why", "--json", "--trace", str(tmp_path / "none.json")]):
        result = CliRunner().invoke(app, command)
        assert (result.exit_code, json.loads(result.stdout)["code"]) == (2, "bad_request")


def test_alternatives_in_words() -> None:
    assert sentence(Alternative("without", ONE, None, "nobody serves layers 0:4")).endswith("nobody serves layers 0:4")
    assert sentence(Alternative("copy", ONE, 0.0421)) == f"with a copy of {ONE[-6:]}: 42.1 ms a token are predicted"


def test_a_plan_shows_the_next_best_routes() -> None:
    def peer(name: str, layer_s: float) -> Announcement:
        return Announcement(
            peer=PeerAddress(PeerId(name)),
            model=ModelId("toy@0"),
            layers=LayerRange(0, 8),
            state=PeerState.SERVING,
            version="0",
            decode_s_per_layer=layer_s,
            prefill_s_per_token_layer=layer_s / 10,
            kv_tokens_free=1000,
        )

    found = plan([peer(ONE, 0.01), peer(OTHER, 0.02)], LayerRange(0, 8), runners_up=3)
    event = as_event(found)
    assert [[hop["peer_id"] for hop in other["hops"]] for other in event["runners_up"]] == [[OTHER]]
    assert event["runners_up"][0]["ms_per_token"] > event["ms_per_token"]
    slower_ms = 8 * 20 + 1e3 * Settings().planner.hop_s
    assert f"next best: {slower_ms:.1f} ms a token: {OTHER[-6:]}[0:8]" in rendered(found, 100)
