"""``swarm status``, ``plan``, ``chat``, ``bench`` and ``chaos``, and ``swarm-peer probe``, as a user runs them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from swarm.local import LocalSwarm
from tests.checkpoints import make_checkpoint
from tests.processes import eventually

pytestmark = [pytest.mark.live, pytest.mark.timeout(120)]

MARK = "TEST_TOOLS_MARK"


def swarm(*arguments: str, stdin: str = "", code: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "swarm.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **environ},
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def joins(thirds: LocalSwarm) -> dict[str, str]:
    return {"SWARM_INITIAL_PEERS": ",".join(thirds.initial_peers)}


def test_status_shows_every_peer(thirds: LocalSwarm, joins: dict[str, str]) -> None:
    (event,) = events(swarm("status", "--json", **joins).stdout)
    serving = {p["peer_id"]: tuple(p["layers"]) for p in event["peers"] if p["state"] == "serving"}
    living = {peer.peer_id: (peer.layers.start, peer.layers.end) for peer in thirds.peers if peer.alive}
    assert living.items() <= serving.items()
    assert event["missing"] == []
    assert len(event["peers_of_layer"]) == event["num_layers"] == 30


def test_plan_predicts_and_opens_nothing(joins: dict[str, str]) -> None:
    (event,) = events(swarm("plan", "--json", **joins).stdout)
    assert [hop["layers"][1] for hop in event["hops"]] == [10, 20, 30]
    assert event["missing"] == []
    assert event["ms_per_token"] > 0


def test_a_plan_without_a_peer_is_one_for_a_swarm_that_lacks_it(thirds: LocalSwarm, joins: dict[str, str]) -> None:
    middle = next(peer.peer_id for peer in thirds.peers if peer.alive and peer.layers.start == 10)
    done = swarm("plan", "--json", "--exclude", middle, code=3, **joins)
    planned, refused = events(done.stdout)
    assert planned["missing"] == [[10, 20]]
    assert refused["message"].startswith("nobody serves layers 10:20: 10 of 30 layers"), "nothing was lost"


def test_probe_measures_the_way_to_a_peer_and_is_dialled_back(thirds: LocalSwarm) -> None:
    """A peer of the same machine dials it, and knows that this says nothing about others."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    listening = ("--host-maddrs", f"/ip4/127.0.0.1/tcp/{port}", "--announce-maddrs", f"/ip4/192.0.2.1/tcp/{port}")
    command = [sys.executable, "-m", "peers.cli", "probe", "--json", "--max-memory-mb", "600", *listening]
    done = subprocess.run(
        [*command, "--initial-peers", thirds.initial_peers[0]], capture_output=True, text=True, timeout=60, check=True
    )
    (event,) = events(done.stdout)
    (way,) = event["peers"]
    assert way["error"] == ""
    assert way["round_trip_ms"] > 0
    assert way["mb_per_s"] > 0
    name = f"peer {way['peer_id'][-6:]}"
    assert event["reachability"]["sentence"].startswith(f"was dialled by {name} of this machine"), event["reachability"]


def test_chat_answers_each_line_of_a_pipe(joins: dict[str, str]) -> None:
    options = ("--temperature", "0", "--max-tokens", "8")
    done = swarm("chat", *options, stdin="Who are you?\n\nWhat can you do?\n", **joins)
    assert len([answer for answer in done.stdout.split("\n") if answer]) == 2


def test_bench_measures_a_swarm_that_runs(thirds: LocalSwarm) -> None:
    peers = [part for address in thirds.initial_peers for part in ("--initial-peers", address)]
    measured = events(swarm("bench", "--quick", "--only", "speed", "--tokens", "4", "--json", *peers).stdout)
    figures = {(one["section"], one["name"]): one["value"] for one in measured}
    assert figures["speed", "swarm"] > 0
    assert sum(section == "hops" and name.endswith("compute") for section, name in figures) == 3


def processes_marked(value: str) -> list[str]:
    found = []
    for process in psutil.process_iter(["pid", "status", "cmdline"]):
        try:
            marked = f"{MARK}={value}".encode() in Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:
            continue
        if marked and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(process.info["cmdline"] or []))
    return found


def test_chaos_changes_no_token_and_leaves_no_process(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "llama", "llama")
    done = swarm(  # so small a model gives a dozen tokens while a process is killed
        *("chaos", "--model", str(checkpoint), "--parts", "2", "--kinds", "kill", "--tokens", "96"),
        *("--context", "40", "--json"),
        **{MARK: "chaos"},
    )
    fault, summary = events(done.stdout)
    assert fault["identical"]
    assert [replayed["layers"] for replayed in fault["replayed"]] in ([[0, 2]], [[2, 4]])
    assert summary["identical"]
    assert summary["stages_left"] == 0
    assert eventually(lambda: not processes_marked("chaos")), processes_marked("chaos")
