"""The console: who may use it, what it shows, and that nothing in it is anything but text."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.exceptions import HTTPException
from typer.testing import CliRunner

from swarm import quickstart
from swarm.commands import gateway as gateway_command
from swarm.commands.app import app
from swarm.commands.gateway import Flags, _notices, _tell_of_losses, _tell_of_spares
from swarm.commands.peers import app as peers_app
from swarm.config import Settings
from swarm.coverage import Coverage
from swarm.errors import BadRequest, Busy
from swarm.gateway import local_peers
from swarm.gateway.console_events import changes, sse
from swarm.gateway.console_guard import COOKIE, HEADERS, host_is_ours
from swarm.gateway.console_live import Live
from swarm.gateway.console_map import ticks
from swarm.gateway.failures import http_error
from swarm.gateway.local_peers import LocalPeers, PeerSpec
from swarm.gateway.serve import Server, listen
from swarm.gateway.state import Access, GatewayState
from swarm.types import Hop, LayerRange, PeerAddress, PeerState, Route
from tests.console_world import ToldClient, ToldGenerations, announcement, peer_id, told_app, told_state

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
PAGES = ("/", "/swarm", "/peers")

# Says what a peer says: it loads, is ready, and leaves when it is asked to.
FAKE_PEER = """
import json, signal, sys, time
def say(**event): print(json.dumps(event), flush=True)
going = []
if "--threads 6" in " ".join(sys.argv[1:]): # deaf for as long as it starts
    say(event="loading", layers=[0, 10], percent=0)
    time.sleep(60)
signal.signal(signal.SIGTERM, lambda *_: going.append(1))
say(event="loading", layers=[0, 10], percent=50)
print("it loads", file=sys.stderr, flush=True)
time.sleep(0.05)
arguments = " ".join(sys.argv[1:])
if "--layers 40:50" in arguments:
    say(event="error", code="config", message="layers 40:50 are none of this model, which has 30")
    sys.exit(2)
say(event="ready", peer_id="12D3KooWfake", addresses=["/ip4/127.0.0.1/tcp/1/p2p/12D3KooWfake"], model="m@1",
    layers=[0, 10], arguments=arguments)
if "--threads 8" in arguments:
    for _ in range(600): say(event="coverage", message="all 30 layers are served")
    say(event="staying", layers=[0, 10], reason="")
if "--threads 7" in arguments:
    say(event="moving", layers=[10, 20], reason="the layers there are the weakest of the swarm")
    say(event="loading", layers=[10, 20], percent=100)
    say(event="staying", layers=[0, 10], reason="others have left them meanwhile")
while not going: time.sleep(0.01)
if "--threads 5" in arguments: # has sessions to hand over, and drops them when it is told once more
    deadline = time.monotonic() + 0.5
    while len(going) < 2 and time.monotonic() < deadline: time.sleep(0.01)
    if len(going) > 1: sys.exit(1)
say(event="draining", sessions=0)
say(event="left")
"""


@asynccontextmanager
async def browser(state: GatewayState, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(told_app(state), client=options.pop("client", ("127.0.0.1", 5000)))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", **options) as client:
        yield client


def token_of(state: GatewayState) -> dict[str, str]:
    return {"X-Swarm-Token": state.access.control_token}


def messages(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


# ---- who may use it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "ours"),
    [
        ("localhost:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.1.7", True),
        ("swarm.example", True),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("", False),
        ("[", False),
    ],
)
def test_only_names_that_lead_nowhere_else_pass_for_this_gateway(header: str, ours: bool) -> None:
    assert host_is_ours(header, Access(host="swarm.example")) is ours


@pytest.mark.parametrize("path", [*PAGES, "/api/token", "/api/status", "/static/console.js"])
async def test_a_rebound_name_gets_nothing(path: str) -> None:
    state = told_state()
    async with browser(state) as client:
        answer = await client.get(path, headers={"host": "evil.example:8000"})
    assert answer.status_code == 403
    assert state.access.control_token not in answer.text


@pytest.mark.parametrize("path", [*PAGES, "/api/status", "/static/console.js", "/static/nothing", "/api/peers/p9"])
async def test_every_answer_has_the_strict_headers(path: str) -> None:
    async with browser(told_state()) as client:
        answer = await client.get(path)
    policy = answer.headers["content-security-policy"]
    assert policy == HEADERS["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


CHANGES = ("/api/peers", "/api/peers/p1/drain", "/api/peers/p1/kill", "/api/generate")


@pytest.mark.parametrize("path", CHANGES)
@pytest.mark.parametrize(
    "headers",
    [{}, {"X-Swarm-Token": "wrong"}, {"Authorization": "Bearer "}],
    ids=["none", "wrong", "an empty key"],
)
async def test_what_changes_something_needs_the_token(path: str, headers: dict[str, str]) -> None:
    async with browser(told_state()) as client:
        answer = await client.post(path, headers=headers, json={})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "forbidden"


@pytest.mark.parametrize("path", CHANGES)
@pytest.mark.parametrize("origin", ["http://localhost:9999", "null", "http://[", ""])
async def test_a_page_of_another_site_changes_nothing_even_with_the_token(path: str, origin: str) -> None:
    state = told_state()
    async with browser(state) as client:
        headers = token_of(state) | {"origin": origin}
        answer = await client.post(path, headers=headers, json={})
    assert answer.status_code == 403
    assert "another site" in answer.text


@pytest.mark.parametrize(
    ("access", "client", "headers", "allowed"),
    [
        (Access(), "127.0.0.1", {}, True),
        (Access(), "127.0.0.1", {"x-forwarded-for": "8.8.8.8"}, False),
        (Access(host="0.0.0.0"), "127.0.0.1", {}, False),
        (Access(host="0.0.0.0"), "192.168.1.9", {}, False),
        (Access(host="0.0.0.0", allow_remote_control=True), "192.168.1.9", {}, True),
    ],
)
async def test_peers_are_controlled_from_this_machine_only_unless_allowed(
    access: Access, client: str, headers: dict[str, str], allowed: bool
) -> None:
    state = told_state(access=access)
    async with browser(state, client=(client, 5000)) as page:
        answer = await page.post("/api/peers/p1/kill", headers=token_of(state) | headers)
        shown = (await page.get("/peers", headers=headers)).text
    assert answer.json()["error"]["code"] == ("bad_request" if allowed else "forbidden")  # there is no p1
    assert ("Start a peer</button>" in shown) is allowed


async def test_with_a_key_everything_asks_for_it() -> None:
    state = told_state(access=Access(api_key="secret"))
    async with browser(state) as client:
        for path in (*PAGES, "/api/token", "/api/status", "/live/swarm"):
            answer = await client.get(path)
            assert answer.status_code == 401, path
            assert state.access.control_token not in answer.text
        sent_away = await client.get("/", headers={"accept": "text/html"})
        assert sent_away.headers["location"] == "/sign-in"
        assert (await client.get("/api/status", headers={"Authorization": "Bearer wrong"})).status_code == 401
        assert (await client.get("/api/status", headers={"Authorization": "Bearer secret"})).status_code == 200


async def test_with_a_key_the_console_may_stand_behind_any_name() -> None:
    headers = {"host": "swarm.example", "Authorization": "Bearer secret"}
    async with browser(told_state(access=Access(host="0.0.0.0", api_key="secret"))) as client:
        assert (await client.get("/swarm", headers=headers)).status_code == 200
        assert (await client.get("/swarm", headers={"host": "swarm.example"})).status_code == 401


async def test_signing_in_takes_the_key_and_leaves_a_cookie_that_is_not_the_key() -> None:
    async with browser(told_state(access=Access(api_key="secret"))) as client:
        wrong = await client.post("/sign-in", data={"key": "guess"})
        assert (wrong.status_code, COOKIE in client.cookies) == (401, False)
        right = await client.post("/sign-in", data={"key": "secret"})
        assert right.status_code == 303
        assert "secret" not in right.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict"} <= set(right.headers["set-cookie"].split("; "))
        assert (await client.get("/api/status")).status_code == 200


async def test_a_body_that_is_too_long_is_refused_before_it_is_kept() -> None:
    state = told_state()
    async with browser(state) as client:
        answer = await client.post("/api/generate", headers=token_of(state), content=b" " * 1_100_000)
    assert answer.status_code == 413


# ---- what it shows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, "/sign-in"])
async def test_pages_have_no_inline_script_or_style_and_name_no_other_host(path: str) -> None:
    async with browser(told_state()) as client:
        html = (await client.get(path)).text
    assert re.findall(r"<script(?![^>]*\bsrc=)", html) == []
    assert re.findall(r"\sstyle=|<style|\son[a-z]+=|javascript:", html) == []
    assert re.findall(r"https?://", html) == []


def test_scripts_and_styles_name_no_other_host() -> None:
    static = Path(local_peers.__file__).parent / "static"
    for name in ("console.css", "console.js", "generate.js", "timeline.js"):
        found = re.findall(r"https?://[^\"')\s]*", (static / name).read_text(encoding="utf-8"))
        assert set(found) <= {"http://www.w3.org/2000/svg"}, name
    for name in ("console.js", "generate.js", "timeline.js"):
        assert "innerHTML" not in (static / name).read_text(encoding="utf-8"), "texts are set as text"


@pytest.mark.parametrize("path", PAGES)
async def test_hostile_names_and_versions_are_shown_as_text(path: str) -> None:
    """The announcement of a peer is what any stranger may write."""
    peer = PeerAddress(peer_id("A"), (f"/dns4/{HOSTILE}/tcp/1",))
    stranger = announcement("A", 0, 30, peer=peer, version=HOSTILE)
    async with browser(told_state([stranger])) as client:
        html = (await client.get(path)).text
    assert "<img" not in html.replace('<img src="/static/icon.svg"', "")
    assert "<script>" not in html


async def test_hostile_input_comes_back_as_text() -> None:
    state = told_state()
    async with browser(state) as client:
        page = await client.get("/peers", params={"layers": HOSTILE})
        said = await client.post("/peers/start", headers=token_of(state), data={"layers": HOSTILE})
    for html in (page.text, said.text):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html


async def test_who_is_reached_through_a_relay_is_shown_as_such_and_named_last_to_join_through() -> None:
    over = PeerAddress(peer_id("A"), (f"/ip4/9.9.9.9/tcp/1/p2p/{peer_id('B')}/p2p-circuit/p2p/{peer_id('A')}",))
    direct = PeerAddress(peer_id("C"), (f"/ip4/8.8.8.8/tcp/1/p2p/{peer_id('C')}",))
    live = Live(told_state([announcement("A", 0, 30, peer=over), announcement("C", 0, 30, peer=direct)]))
    assert [row.relay for row in (await live.map()).rows] == [True, False]
    assert (await live.fragments("swarm", control=True))["map"].count(", relayed") == 1
    assert live.join_addresses() == [*direct.multiaddrs, *over.multiaddrs]


async def test_the_map_says_what_is_missing_and_what_would_fill_it() -> None:
    peers = [announcement("A", 0, 10), announcement("B", 20, 30), announcement("C", 10, 20, state=PeerState.JOINING)]
    live = Live(told_state(peers))
    html = (await live.fragments("swarm", control=True))["map"]
    assert "Nobody serves layers 10:20" in html
    assert 'href="/peers?layers=10:20"' in html
    assert 'href="/peers' not in (await live.fragments("swarm", control=False))["map"]
    assert [run.count for run in (await live.map()).runs] == [1, 0, 1]
    pill = (await live.fragments("swarm", control=True))["pill"]
    assert "3 peers, 20 of 30 layers" in pill
    assert "nobody serves layers 10:20" in pill


async def test_an_empty_swarm_and_an_old_announcement_are_told_in_words() -> None:
    assert "No peer is announced" in (await Live(told_state([])).fragments("swarm", control=True))["map"]
    state = told_state()
    state.client.view.age_s = 31.0  # type: ignore[attr-defined]
    assert "n stale" in (await Live(state).fragments("swarm", control=True))["map"]


async def test_the_feed_sends_a_part_only_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swarm.gateway.console_live.TICK_S", 0.001)
    state = told_state()
    feed = Live(state).feed("swarm", control=True)
    first = {(await anext(feed)).splitlines()[0] for _ in range(2)}
    assert first == {"event: pill", "event: map"}
    state.client.view.peers.append(announcement("D", 0, 10))  # type: ignore[attr-defined]
    assert "4 peers" in await anext(feed)
    state.hub.close()
    assert ["event: map" in part for part in [part async for part in feed]] == [True], "and then it ends"


async def test_a_killed_peer_of_this_gateway_leaves_map_and_join_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The swarm hears of it only when its announcement has expired."""
    state = told_state()
    monkeypatch.setattr(LocalPeers, "gone", lambda self: {peer_id("B")})
    live = Live(state)
    assert [row.peer_id for row in (await live.map()).rows] == [peer_id("A"), peer_id("C")]
    assert "Nobody serves layers 10:20" in (await live.fragments("swarm", control=True))["map"]
    assert not any(peer_id("B") in address for address in live.join_addresses())


@pytest.mark.parametrize("num_layers", [1, 2, 7, 22, 30, 80, 126, 4096])
def test_the_axis_has_a_few_round_ticks(num_layers: int) -> None:
    found = ticks(num_layers)
    assert 1 <= len(found) <= 7
    assert found[0] == 0
    assert found[-1] < num_layers


def test_join_instructions_warn_where_nobody_else_could_follow_them() -> None:
    here = Live(told_state())
    assert here.join_addresses()[0].startswith("/ip4/127.0.0.1/")
    public = PeerAddress(peer_id("D"), (f"/ip4/93.184.216.34/tcp/31330/p2p/{peer_id('D')}",))
    assert here.join()["only_here"]
    peers = [announcement("A", 0, 30), announcement("D", 0, 30, peer=public)]
    mixed = Live(told_state(peers))
    assert mixed.join_addresses()[0] == public.multiaddrs[0]
    assert (mixed.join()["addresses"], mixed.join()["only_here"]) == ([*public.multiaddrs], False), "for elsewhere"


def test_the_addresses_to_join_by_stay_in_their_order_as_announcements_are_renewed() -> None:
    """Somebody is copying them."""
    state = told_state()
    ages = {peer_id(letter): age for letter, age in zip("ABC", (3.0, 2.0, 1.0), strict=True)}
    state.client.view.age = lambda peer: ages[peer]  # type: ignore[method-assign, assignment, misc]
    before = Live(state).join_addresses()
    ages[peer_id("A")] = 0.0
    assert Live(state).join_addresses() == before
    ages[peer_id("A")] = 31.0
    assert Live(state).join_addresses() == [*before[1:], before[0]], "who may be gone is named last"


# ---- generating -----------------------------------------------------------------------------------------------------


def test_an_event_of_many_lines_stays_one_event() -> None:
    assert sse("map", "a\nb") == "event: map\ndata: a\ndata: b\n\n"


async def test_a_generation_is_told_with_its_hops_and_its_rebuild() -> None:
    state = told_state()
    generations: ToldGenerations = state.generations  # type: ignore[assignment]
    generations.lost_at = 2
    async with browser(state) as client:
        answer = await client.post("/api/generate", headers=token_of(state), json={"prompt": "Why?", "max_tokens": 4})
    told = messages(answer.text)
    kinds = [message["event"] for message in told]
    assert kinds == ["began", "route", "token", "token", "route", "token", "token", "done"]
    assert told[1]["changes"] == []
    assert told[4]["index"] == 2
    lost = {"peer_id": peer_id("B"), "layers": [10, 20]}
    taken = {"peer_id": peer_id("D"), "layers": [10, 20]}
    assert told[4]["changes"] == [{"lost": lost, "taken_by": [taken]}]
    assert [hop["peer_id"] for hop in told[-2]["hops"]] == [peer_id(letter) for letter in "ADC"]
    assert told[-1]["finish_reason"] == "length"
    assert "".join(m["text"] for m in told if m["event"] == "token") == "The sky looks blue "
    assert generations.running == 0


async def test_a_long_text_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    request = ToldClient.request

    def told(self: ToldClient, prompt: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return request(self, prompt, **options)

    monkeypatch.setattr(ToldClient, "request", told)
    state = told_state()
    async with browser(state) as client:
        await client.post("/api/generate", headers=token_of(state), json={"prompt": "Why?" * 9999, "max_tokens": 1})
    assert threads[0] is not threading.current_thread()


async def test_a_generation_that_waits_sends_comments() -> None:
    state = told_state()
    quick = replace(state.settings.gateway, keep_alive_s=0.01)
    state = replace(state, settings=replace(state.settings, gateway=quick))
    state.generations.token_s = 0.05  # type: ignore[attr-defined]
    async with browser(state) as client:
        answer = await client.post("/api/generate", headers=token_of(state), json={"prompt": "Why?", "max_tokens": 2})
    assert ": still here\n\n" in answer.text
    assert [message["event"] for message in messages(answer.text)] == ["began", "route", "token", "token", "done"]


async def test_missing_layers_are_told_in_the_stream() -> None:
    state = told_state()
    state.generations.refuses = True  # type: ignore[attr-defined]
    async with browser(state) as client:
        answer = await client.post("/api/generate", headers=token_of(state), json={"prompt": "Why?"})
    last = messages(answer.text)[-1]
    assert last == {"event": "error", "code": "no_route", "message": "nobody serves layers 10:20"}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "unknown": 1},
        {"messages": [{"role": "tool", "content": "b"}]},
        {"prompt": 3},
    ],
)
async def test_a_wrong_request_is_refused_in_words(body: dict[str, Any]) -> None:
    state = told_state()
    async with browser(state) as client:
        answer = await client.post("/api/generate", headers=token_of(state), json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert "Value error" not in answer.text


def test_a_rebuild_that_cuts_the_layers_anew_names_all_who_took_them() -> None:
    def route(*hops: tuple[str, int, int]) -> Route:
        return Route(tuple(Hop(PeerAddress(peer_id(p)), LayerRange(a, b)) for p, a, b in hops))

    before = route(("A", 0, 10), ("B", 10, 20), ("C", 20, 30))
    found = changes(before, route(("A", 0, 10), ("D", 10, 15), ("E", 15, 20), ("C", 20, 30)))
    assert [change["lost"]["peer_id"] for change in found] == [peer_id("B")]
    assert [hop["peer_id"] for hop in found[0]["taken_by"]] == [peer_id("D"), peer_id("E")]
    assert changes(before, before) == []


# ---- peers of this gateway ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked",
    [
        {"layers": "10"},
        {"layers": "20:10"},
        {"layers": "auto; rm"},
        {"device": "tpu"},
        {"device": "cuda:0 --model x"},
        {"device": "cuda:0\n"},
        {"max_memory_mb": -1},
        {"max_memory_mb": 3},
        {"threads": -1},
        {"model": "--identity=/etc/passwd"},
        {"model": "a\nb"},
        {"host_maddrs": "0.0.0.0:31330"},
        {"host_maddrs": "/ip4/0.0.0.0/tcp/1, --identity=/etc/passwd"},
        {"dtype": "float8"},
        {"weights": "int3"},
    ],
)
def test_a_peer_that_could_not_run_is_not_started(asked: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        PeerSpec(**({"model": "smollm2-135m"} | asked))


@asynccontextmanager
async def fake_peers(folder: Path) -> AsyncIterator[LocalPeers]:
    script = folder / "peer.py"
    script.write_text(FAKE_PEER, encoding="utf-8")
    async with LocalPeers(command=(sys.executable, str(script)), stop_s=5.0) as peers:
        yield peers


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
async def test_a_peer_of_the_gateway_is_started_drained_and_listed(tmp_path: Path) -> None:
    async with fake_peers(tmp_path) as local:
        state = told_state(local_peers=local)
        state.client.profile = replace(state.client.profile, weights="int4")
        async with browser(state, headers=token_of(state)) as client:
            assert "--dtype float32 --weights int4 --host-maddrs" in (await client.get("/peers")).text
            assert "30 layers, float32, int4 weights." in (await client.get("/swarm")).text
            body = {"layers": "0:10", "device": "cpu", "max_memory_mb": 900, "host_maddrs": "/ip4/0.0.0.0/tcp/0"}
            started = (await client.post("/api/peers", json=body)).json()
            assert started["asked"]["host_maddrs"] == "/ip4/0.0.0.0/tcp/0"
            assert started["asked"]["weights"] == "int4", "others would be another model"
            assert (started["name"], started["asked"]["layers"]) == ("p1", "0:10")
            await local.serving("p1", 10.0)
            listed = (await client.get("/api/peers")).json()["peers"]
            assert [(p["state"], p["peer_id"], p["layers"]) for p in listed] == [("serving", "12D3KooWfake", [0, 10])]
            assert (await client.get("/api/peers/p1/log")).json()["log"] == "it loads"
            assert "it loads" in (await client.get("/peers/p1/log")).text
            assert "12D3KooWfake"[-6:] in (await Live(state).fragments("peers", control=True))["own"]
            shown = [(await Live(state).fragments("peers", control=may))["own"] for may in (True, False)]
            assert ["Kill" in html for html in shown] == [True, False]
            assert (await client.post("/peers/p1/drain")).status_code == 200
            child = local._find("p1").child
            assert child.wait(5.0) == 0
            assert (await client.get("/api/peers/p1")).json()["state"] == "left"


HOSTS = "/ip4/0.0.0.0/tcp/31330, /ip6/::/tcp/31330"


async def test_a_peer_is_given_what_was_asked_for_and_ways_to_join(tmp_path: Path) -> None:
    async with fake_peers(tmp_path) as local:
        spec = PeerSpec(
            model="smollm2-135m",
            layers="5:9",
            weights="int4",
            device="cpu",
            max_memory_mb=700,
            threads=2,
            host_maddrs=HOSTS,
        )
        local.start(spec, ["/ip4/127.0.0.1/tcp/7/p2p/12D3KooWx"])
        await local.serving("p1", 10.0)
        ready = local._find("p1").child.newest("ready")
    assert ready["arguments"].split() == [
        *("serve", "--json", "--model", "smollm2-135m", "--layers", "5:9", "--device", "cpu", "--dtype", "float32"),
        *("--weights", "int4", "--threads", "2", "--max-memory-mb", "700"),
        *("--host-maddrs", "/ip4/0.0.0.0/tcp/31330", "--host-maddrs", "/ip6/::/tcp/31330"),
        *("--initial-peers", "/ip4/127.0.0.1/tcp/7/p2p/12D3KooWx"),
    ]


async def test_a_peer_that_stays_where_it_is_serves(tmp_path: Path) -> None:
    async with fake_peers(tmp_path) as local:
        local.start(PeerSpec(model="m", threads=7), [])
        assert await asyncio.to_thread(local._find("p1").child.event, "staying", 10.0)
        peer = local.peer("p1")
        assert (peer.state, peer.percent, peer.layers) == ("serving", 100, LayerRange(0, 10))


async def test_a_peer_that_has_said_much_is_still_known(tmp_path: Path) -> None:
    async with fake_peers(tmp_path) as local:
        local.start(PeerSpec(model="m", threads=8), [])
        assert await asyncio.to_thread(local._find("p1").child.event, "staying", 10.0)
        assert (local.peer("p1").peer_id, local.peer("p1").model) == ("12D3KooWfake", "m@1")
        assert local.names() == {"12D3KooWfake": "p1"}


async def test_a_peer_that_is_told_to_leave_is_seen_to_leave_at_once_and_told_but_once(tmp_path: Path) -> None:
    async with fake_peers(tmp_path) as local:
        local.start(PeerSpec(model="m", threads=5), [])
        await local.serving("p1", 10.0)
        told = [local.drain("p1") for _ in range(2)]
        assert [(peer.state, peer.detail) for peer in told] == [("draining", "is told to leave")] * 2
        await asyncio.to_thread(local._find("p1").child.wait, 10.0)
        assert (local.peer("p1").state, local.peer("p1").detail) == ("left", "left the swarm")


async def test_a_peer_that_is_stopped_while_it_starts_has_left_and_not_failed(tmp_path: Path) -> None:
    async with fake_peers(tmp_path) as local:
        local.start(PeerSpec(model="m", threads=6), [])
        assert await asyncio.to_thread(local._find("p1").child.event, "loading", 10.0)
        local.drain("p1")
        await asyncio.to_thread(local._find("p1").child.wait, 10.0)
        assert (local.peer("p1").state, local.peer("p1").detail) == ("left", "ended before it had joined")


async def test_a_killed_peer_is_gone_at_once_and_nothing_outlives_the_gateway(tmp_path: Path) -> None:
    async with fake_peers(tmp_path) as local:
        assert local.names() == {}
        for _ in range(2):
            local.start(PeerSpec(model="m"), [])
        for name in ("p1", "p2"):
            await local.serving(name, 10.0)
        killed = local.kill("p1")
        assert (killed.state, killed.detail) == ("left", "killed")
        assert (local.names(), local.gone()) == ({"12D3KooWfake": "p2"}, {"12D3KooWfake"})
        children = [local._find(name).child for name in ("p1", "p2")]
        assert [child.alive for child in children] == [False, True]
    assert [child.alive for child in children] == [False, False]


async def test_swarm_peers_lists_starts_and_stops_them(tmp_path: Path) -> None:
    async with fake_peers(tmp_path) as local:
        state = told_state(access=Access(api_key="secret"), local_peers=local)
        with listen("127.0.0.1", 0) as sock:
            ready = asyncio.Event()
            served = told_app(state)
            served.add_exception_handler(HTTPException, http_error)
            server = Server(served, state.settings.gateway, ready.set, state.hub.close)
            serving = asyncio.create_task(server.serve(sockets=[sock]))
            await ready.wait()
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"

            async def swarm_peers(*arguments: str, key: str = "secret") -> tuple[int, str, str]:
                command = [*arguments, "--gateway", url, "--api-key", key]
                done = await asyncio.to_thread(CliRunner().invoke, peers_app, command)
                return done.exit_code, done.stdout, done.stderr

            code, out, err = await swarm_peers("list")
            assert (code, out) == (0, "")
            assert "has started no peer" in err
            code, out, _ = await swarm_peers("start", "--layers", "0:10", "--json")
            assert (code, json.loads(out)["state"]) == (0, "serving")
            code, out, _ = await swarm_peers("list")
            assert out.splitlines()[1].split()[:4] == ["p1", "serving", "0:10", "KooWfake"[-6:]]
            assert (await swarm_peers("start", "--layers", "9"))[0] == 2
            code, _, err = await swarm_peers("start", "--layers", "40:50")  # of a model that the peer alone has read
            assert code == 2
            assert "layers 40:50 are none of this model" in err
            assert (await swarm_peers("stop", "p7"))[0] == 2
            code, _, err = await swarm_peers("stop", "../p1")
            assert (code, err) == (2, "swarm: Invalid URL (POST /api/peers/../p1/drain)\n")
            asked = "the gateway has another API key than --api-key, or SWARM_API_KEY"
            assert await swarm_peers("list", key="wrong") == (2, "", f"swarm: {asked}\n")
            code, out, _ = await swarm_peers("stop", "p2", "--json")
            assert (code, json.loads(out)["state"]) == (0, "failed"), "it is gone, as was asked for"
            code, out, _ = await swarm_peers("stop", "p1", "--json")
            assert (code, json.loads(out)["detail"]) == (0, "left the swarm")
            server.should_exit = True
            await serving
            assert (await swarm_peers("list"))[0] == 4


NO_HTTP = b"\x13/multistream/1.0.0\n"
OTHER_SITE = b"HTTP/1.0 404 Not Found\r\n\r\n<h1>Not here</h1>"
OTHER_MODEL_SERVER = b'HTTP/1.0 404 Not Found\r\n\r\n{"error": {"code": 404, "message": "File Not Found"}}'


@pytest.mark.parametrize(
    ("said", "told"),
    [(NO_HTTP, ""), (OTHER_SITE, ": 404 Not Found"), (OTHER_MODEL_SERVER, ": 404 Not Found")],
    ids=["a peer", "a site", "a model server"],
)
def test_what_is_another_server_is_no_gateway(said: bytes, told: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(said)

        answering = threading.Thread(target=answer)
        answering.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = CliRunner().invoke(peers_app, ["list", "--gateway", url])
        answering.join(10)
    assert (done.exit_code, done.stderr) == (4, f"swarm: what answers at {url} is no gateway{told}\n")


def test_peers_are_started_and_invited_with_the_model_of_the_swarm(tmp_path: Path) -> None:
    state = told_state()
    state.client.profile = replace(state.client.profile, name="other")
    assert Live(state).model_reference() == "other", "not what the settings name: nobody there would use that"
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with_model = replace(state.settings, model=replace(state.settings.model, name=str(folder)))
    assert Live(replace(state, settings=with_model)).model_reference() == str(folder)


def test_the_model_that_a_gateway_is_told_is_that_of_the_peers_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []

    async def serve(settings: Settings, flags: Flags) -> None:
        served.append(settings.model.name)

    monkeypatch.setattr(gateway_command, "_serve", serve)
    CliRunner().invoke(app, ["gateway", "--model", "some/folder"], catch_exceptions=False)
    assert served == ["some/folder"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--web", "x"], "not x\n"),
        (["--web", "8000", "more"], "not 8000 more\n"),
        (["--port", "8000"], "no option --port\n"),
    ],
)
def test_the_quick_start_refuses_what_is_no_option_or_port(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quickstart.main(arguments) == 2
    told = capsys.readouterr().err
    assert why in told
    assert "bin/quickstart --web [PORT]" in told


def test_the_quick_start_takes_no_settings_of_another_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started:
        initial_peers = ("/ip4/127.0.0.1/tcp/1",)

    given: list[dict[str, str]] = []

    def ran(command: list[str], *, check: bool, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        assert command[-2:] == ["--", "-1?"]
        given.append(dict(os.environ) if env is None else env)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(quickstart, "LocalSwarm", lambda *_, **__: contextlib.nullcontext(Started()))
    monkeypatch.setattr(subprocess, "run", ran)
    monkeypatch.setattr(quickstart.signal, "signal", lambda *_: None)
    monkeypatch.setenv("SWARM_POLICY_GPU_REQUIRED", "true")
    assert quickstart.main(["--", "-1?"]) == 0
    assert "SWARM_POLICY_GPU_REQUIRED" not in given[0]
    assert "PATH" in given[0]


async def test_only_peers_of_this_gateway_can_be_stopped_and_not_too_many_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_peers, "MAX_PEERS", 1)
    async with fake_peers(tmp_path) as local:
        for act in (local.drain, local.kill, local.log, local.peer):
            with pytest.raises(BadRequest, match="started no peer"):
                act("p1")
        local.start(PeerSpec(model="m"), [])
        with pytest.raises(Busy, match="limit"):
            local.start(PeerSpec(model="m"), [])


async def test_a_gateway_says_which_of_its_peers_it_has_lost_and_not_which_were_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with fake_peers(tmp_path) as local:
        for _ in range(3):
            name = local.start(PeerSpec("m"), []).name
            await local.serving(name, 10.0)
        local.kill("p1")
        local.drain("p2")
        os.kill(local.peer("p3").pid, signal.SIGKILL)
        for name in ("p2", "p3"):
            await asyncio.to_thread(local._find(name).child.wait, 10.0)
        telling = asyncio.create_task(_tell_of_losses(local))
        await asyncio.sleep(0)
        telling.cancel()
    assert capsys.readouterr().err == "swarm: peer p3 with layers 0:10 is lost: ended by signal 9\n"


def test_a_gateway_says_at_its_start_what_is_missing_and_who_may_use_it() -> None:
    whole, part = Coverage((1, 1), (), 0, 1), Coverage((1, 0), (LayerRange(1, 2),), 7_000_000, 1)
    assert list(_notices(Access(), whole)) == []
    told = list(_notices(Access("0.0.0.0"), part))
    assert told[0].startswith("no answers yet: nobody serves layers 1:2: 1 of 2 layers, 7 MB of weights; a peer")
    assert "0.0.0.0" in told[1]
    assert list(_notices(Access("0.0.0.0", api_key="secret"), whole)) == []


async def test_a_gateway_tells_when_its_spares_serve_or_why_they_do_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with fake_peers(tmp_path) as local:
        await _tell_of_spares(local, [local.start(PeerSpec("m", layers=layers), []) for layers in ("40:50", "0:10")])
    told = capsys.readouterr().err
    assert "spare p2 loads layers 0:10 meanwhile" in told
    assert "a spare failed: peer p1: layers 40:50 are none of this model" in told
    assert "spare p2 serves layers 0:10" in told
