"""The console in a real Chromium, on real peers: what a user sees, starts and kills there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.models import resolve, tokenizer_files
from swarm.tokenizer import TextTokenizer
from tests.live.helpers import MODEL, THIRDS, Reference
from tests.processes import is_gone

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (bin/setup test)")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROOT = Path(__file__).parents[2]
PROMPT = "The history of the bridge begins with"
TOKENS = 48
WAIT_MS = 60_000

pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(150, func_only=True),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)"),
]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a gateway that has started a peer for each third of the layers, and starts one more for the second."""
    starts = [part for layers in THIRDS for part in ("--start", str(layers))] + ["--spare", str(THIRDS[1])]
    log = tmp_path_factory.mktemp("gateway") / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "swarm.cli", "gateway", "--port", "0", "--model", MODEL, "--json", *starts],
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=ROOT,
            env=environment,
        )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()  # ends with the process, and that with its own deadlines
            assert line, log.read_text()
            yield json.loads(line)["url"]
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                assert process.wait(30) == 0, log.read_text()
            finally:
                process.kill()
                process.stdout.close()


@contextlib.contextmanager
def told_gateway(port: int, *key: str) -> Iterator[str]:
    """Address of a gateway of a swarm that is only told of, started again as often as need be."""
    command = [sys.executable, "-m", "tests.console_world", str(port), *key]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: playwright.Browser) -> Iterator[playwright.Page]:
    """A fresh tab; nothing may be reported on its console, such as a violation of the content security policy."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    tab = context.new_page()
    tab.set_default_timeout(WAIT_MS)
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    yield tab
    context.close()
    assert said == []


@pytest.fixture(scope="module")
def expected(reference: Reference) -> str:
    """What ``transformers`` continues with."""
    tokenizer = TextTokenizer(tokenizer_files(resolve(MODEL)))
    return tokenizer.decode(reference.greedy(tokenizer.encode(PROMPT), TOKENS))


def ask(page: playwright.Page, url: str) -> None:
    page.goto(url)
    page.get_by_text("Continue", exact=True).click()
    page.fill("#max-tokens", str(TOKENS))
    page.fill("#temperature", "0")
    page.fill("#prompt", PROMPT)
    page.press("#prompt", "Enter")


def text_of(page: playwright.Page) -> str:
    """Once it is complete."""
    page.locator("#transcript .answer .end").wait_for()
    parts = "e => [...e.childNodes].filter(n => n.nodeType === Node.TEXT_NODE).map(n => n.data).join('')"
    return str(page.locator("#transcript .answer").evaluate(parts))


def lane(page: playwright.Page, peer_id: str) -> playwright.Locator:
    return page.locator(f'#timeline .lane[data-peer="{peer_id}"]')


def guesses(page: playwright.Page) -> int:
    """Tokens that were guessed ahead: they came with the pass of another, which has the bar."""
    return int(page.locator("#timeline .guess").count())


def test_a_prompt_streams_and_each_hop_has_its_bars(page: playwright.Page, gateway: str, expected: str) -> None:
    ask(page, gateway)
    page.locator("#chain .hop").nth(2).wait_for()
    assert text_of(page) == expected
    ranges = page.locator("#chain .hop .line:nth-child(2) span:first-child").all_inner_texts()
    assert ranges == [str(layers) for layers in THIRDS]
    for hop in page.locator("#chain .hop").all():
        bars = lane(page, str(hop.get_attribute("data-peer"))).locator(".bar-compute")
        assert bars.count() == TOKENS - guesses(page)
    assert page.locator("#timeline .lane-label").get_by_text("p50").count() == 4
    assert page.locator("#events li").count() == 0


def test_escape_stops_it_and_a_hostile_prompt_stays_text(page: playwright.Page, gateway: str) -> None:
    page.goto(gateway)
    hostile = "<img src=x onerror=alert(1)><script>alert(1)</script> Tell me a long story about a bridge."
    page.fill("#max-tokens", "2000")
    page.fill("#temperature", "0")  # the answer to this has more than 600 tokens; a sampled one may end before Escape
    page.fill("#prompt", hostile)
    page.press("#prompt", "Enter")
    page.locator("#timeline .bar-compute").nth(6).wait_for(state="attached")
    page.keyboard.press("Escape")
    page.locator("#transcript .answer .end", has_text="stopped").wait_for()
    assert page.locator("#transcript .user").inner_text() == hostile
    assert page.locator("#transcript img, #transcript script").count() == 0


def test_new_forgets_an_answer_that_is_under_way_and_a_reload_does_not(page: playwright.Page, gateway: str) -> None:
    def say(text: str) -> None:
        page.fill("#max-tokens", "2000")
        page.fill("#temperature", "0")
        page.fill("#prompt", text)
        page.press("#prompt", "Enter")
        page.locator("#timeline .bar-compute").nth(4).wait_for(state="attached")

    page.goto(gateway)
    say("Tell me a long story about a bridge.")
    page.reload()
    assert len(page.locator("#transcript .answer").inner_text()) > 8
    say("Tell me a long story about a ship.")
    page.click("#new")
    page.locator("#send").wait_for()
    assert page.locator("#transcript .turn").count() == page.locator("#chain .hop").count() == 0
    assert page.locator("#empty").is_visible()
    page.reload()
    assert page.locator("#transcript .turn").count() == 0


def test_a_peer_started_from_the_page_joins_and_is_on_the_map(page: playwright.Page, gateway: str) -> None:
    page.goto(f"{gateway}/peers?layers=10:20")
    before = page.locator(".own-peer").count()
    page.get_by_role("button", name="Start a peer").click()
    page.get_by_text("is starting.").wait_for()
    started = page.locator(".own-peer").nth(before)
    started.locator(".state.serving").wait_for()
    peer_id = started.locator("code").get_attribute("title")
    page.locator(".own-peer button", has_text="Log").last.click()
    page.locator("#log-text", has_text="serving layers 10:20").wait_for()
    page.goto(f"{gateway}/swarm")
    row = page.locator(f"#peer-{peer_id}")
    row.locator(".state.serving").wait_for()
    assert row.locator(".range").inner_text() == "10:20"
    page.locator(".verdict.good").wait_for()


def test_a_peer_killed_from_the_page_leaves_the_text_as_it_was(
    page: playwright.Page, gateway: str, expected: str
) -> None:
    page.goto(f"{gateway}/peers")
    page.locator(".own-peer").nth(len(THIRDS)).locator(".state.serving").wait_for()
    ask(page, gateway)
    middle = page.locator("#chain .hop").nth(1)
    victim = str(middle.get_attribute("data-peer"))
    lane(page, victim).locator(".bar-compute").nth(9).wait_for(state="attached")
    middle.get_by_role("button", name="Kill").click()

    assert text_of(page) == expected
    told = page.locator("#events li .what").inner_text()
    assert f"lost {victim[-6:]}, layers 10:20 taken by" in told
    assert "stall" in page.locator("#events li .stall").inner_text()
    assert page.locator("#chain .hop.lost").get_attribute("data-peer") == victim
    heir = str(page.locator("#chain .hop.fresh").get_attribute("data-peer"))
    counts = [lane(page, peer).locator(".bar-compute").count() for peer in (victim, heir)]
    assert sum(counts) == TOKENS - guesses(page), "each pass's bar stands in the lane of the peer that computed it"
    assert min(counts) > 0
    assert "gone" in str(lane(page, victim).get_attribute("class"))
    assert page.locator("#timeline .break").count() >= 4, "the break goes through the lanes"
    label = str(page.locator("#timeline .strip text").text_content())
    assert label.startswith(f"{victim[-6:]} → {heir[-6:]}, stall")
    assert page.locator("#transcript .seam").count() == 1

    page.goto(f"{gateway}/peers")
    listed = json.loads(page.request.get(f"{gateway}/api/peers").text())["peers"]
    killed = next(peer for peer in listed if peer["peer_id"] == victim)
    assert (killed["state"], killed["detail"]) == ("left", "killed")
    assert is_gone(killed["pid"])


def test_a_session_that_waits_for_layers_says_so(page: playwright.Page, gateway: str) -> None:
    ask(page, gateway)
    page.locator("#timeline .bar-compute").nth(6).wait_for(state="attached")
    token = {"X-Swarm-Token": json.loads(page.request.get(f"{gateway}/api/token").text())["token"]}
    for peer in json.loads(page.request.get(f"{gateway}/api/peers").text())["peers"]:
        if peer["layers"] == [10, 20] and peer["state"] == "serving":
            assert page.request.post(f"{gateway}/api/peers/{peer['name']}/kill", headers=token).ok
    page.locator("#chain-empty", has_text="Waiting: nobody serves layers 10:20.").wait_for()
    assert page.locator("#chain .hop.missing").count() == 1
    assert page.locator("#chain-empty a").get_attribute("href") == "/peers?layers=10:20"
    page.keyboard.press("Escape")
    page.locator("#transcript .answer .end", has_text="stopped").wait_for()
    assert not page.locator("#chain-empty").is_visible()


def test_pages_say_that_the_gateway_is_away_and_go_on_with_one_that_was_started_anew(
    browser: playwright.Browser,
) -> None:
    port = free_port()
    with browser.new_context() as context:
        context.set_default_timeout(WAIT_MS)
        peers, talk = context.new_page(), context.new_page()
        with told_gateway(port) as url:
            peers.goto(f"{url}/peers")
            talk.goto(url)
        peers.locator("#offline").wait_for()
        peers.get_by_role("button", name="Start a peer").click()
        peers.locator("#said", has_text="The gateway does not answer.").wait_for()
        talk.fill("#prompt", "Why?")
        talk.press("#prompt", "Enter")
        talk.locator("#transcript .problem").wait_for()
        assert talk.input_value("#prompt") == "Why?", "it can be sent again"
        with told_gateway(port):
            peers.locator("#offline").wait_for(state="hidden")
            peers.fill("[name=layers]", "9:3")
            peers.get_by_role("button", name="Start a peer").click()
            peers.locator("#said", has_text="layer range 9:3 is empty or negative").wait_for()


def test_a_page_asks_for_the_key_once_more_after_a_gateway_was_started_anew(browser: playwright.Browser) -> None:
    port = free_port()
    with browser.new_context() as context:
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        with told_gateway(port, "secret") as url:
            page.goto(f"{url}/swarm")
            page.fill("[name=key]", "secret")
            page.press("[name=key]", "Enter")
            page.locator("#composer").wait_for()
            page.wait_for_load_state()  # with its scripts: the page is shown before they have come
        page.locator("#offline").wait_for()
        with told_gateway(port, "secret"):
            page.wait_for_url("**/sign-in")
