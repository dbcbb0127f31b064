"""LocalSwarm with a stand-in for the peer: a script that speaks the same lines and has a child of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from swarm import local
from swarm.errors import BadRequest, DeadlineExceeded, ModelError, SwarmError
from swarm.local import PEER_COMMAND, LocalSwarm
from swarm.types import LayerRange
from tests.processes import eventually, is_gone

FAKE_PEER = """
import json, os, signal, subprocess, sys, time
args = sys.argv[1:]
layers = args[args.index("--layers") + 1]
joins = [value for flag, value in zip(args, args[1:]) if flag == "--initial-peers"]
say = lambda **event: print(json.dumps(event), flush=True)
print("loading", layers, file=sys.stderr, flush=True)
if "--crash" in args:
    sys.exit("out of luck")
if "--refuse" in args:
    say(event="error", code="model", message="no such weights")
    sys.exit(2)
daemon = subprocess.Popen(
    [sys.executable, "-c", "import time; time.sleep(600)"],
    stdout=subprocess.DEVNULL,
    start_new_session="--apart" in args,
)
def leave(*_):
    if "--stubborn" not in args:
        daemon.kill()
        sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print("a line of some library")
if "--hang" not in args:
    say(event="ready", peer_id=f"P{os.getpid()}", addresses=[f"/ip4/127.0.0.1/tcp/{os.getpid()}"], model="m@1",
        layers=[int(part) for part in layers.split(":")], pid=os.getpid(), daemon=daemon.pid, joins=joins,
        args=args, env={name: value for name, value in os.environ.items() if name.startswith("SWARM_")})
while True:
    time.sleep(1)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "fake peer.py"
    script.write_text(FAKE_PEER)
    return [sys.executable, str(script)]


def test_a_folder_called_as_the_package_is_not_taken_for_it(tmp_path: Path) -> None:
    for name in ("swarm", "peers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    done = subprocess.run([*PEER_COMMAND, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


THIRDS = (LayerRange(0, 10), LayerRange(10, 20), LayerRange(20, 30))


def daemons(swarm: LocalSwarm) -> list[int]:
    found = []
    for peer in swarm.peers:
        event = peer.child.event("ready", 0)
        assert event is not None
        found.append(int(event["daemon"]))
    return found


def test_peers_start_through_the_first_and_stop_together(
    command: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARM_INITIAL_PEERS", "/ip4/9.9.9.9/tcp/1")
    said: list[str] = []
    with LocalSwarm(
        "m",
        THIRDS,
        dtype="bfloat16",
        threads=2,
        env={"SWARM_TIMEOUTS_DRAIN_S": "1"},
        log_dir=tmp_path / "logs",
        command=command,
        report=said.append,
    ) as swarm:
        assert [peer.layers for peer in swarm.peers] == list(THIRDS)
        first = swarm.peers[0]
        assert first.model == "m@1"
        assert first.peer_id == f"P{first.pid}"
        assert swarm.initial_peers == [address for peer in swarm.peers for address in peer.addresses]
        events = [peer.child.event("ready", 0) or {} for peer in swarm.peers]
        assert [event["joins"] for event in events] == [[], list(first.addresses), list(first.addresses)]
        assert events[0]["args"] == ["serve", "--model", "m", "--layers", "0:10", "--json", "--dtype", "bfloat16"]
        assert events[0]["env"] == {"SWARM_PEER_THREADS": "2", "SWARM_TIMEOUTS_DRAIN_S": "1"}
        pids = [peer.pid for peer in swarm.peers] + daemons(swarm)
        assert not any(is_gone(pid) for pid in pids)
    assert all(is_gone(pid) for pid in pids)
    assert (tmp_path / "logs" / "peer-1.log").read_text() == "loading 10:20\n"
    assert any("peer 2 [20:30]: ready" in line for line in said)


@pytest.mark.parametrize("where", [[], ["--apart"]], ids=["same group", "own group"])
def test_kill_takes_the_daemon_along_and_a_replacement_joins_the_living(
    command: Sequence[str], where: list[str]
) -> None:
    with LocalSwarm("m", THIRDS[:2], command=command, extra_args=where) as swarm:
        dead = [swarm.peers[0].pid, daemons(swarm)[0]]
        swarm.kill(0)
        assert not swarm.peers[0].alive
        assert eventually(lambda: all(is_gone(pid) for pid in dead))
        added = swarm.add(THIRDS[0])
        event = added.child.event("ready", 0) or {}
        assert event["joins"] == list(swarm.peers[1].addresses)
        assert swarm.peers[2] is added


@pytest.mark.parametrize("where", [[], ["--apart"]], ids=["same group", "own group"])
def test_freeze_and_resume(command: Sequence[str], where: list[str]) -> None:
    def state(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    with LocalSwarm("m", THIRDS[:1], command=command, extra_args=where) as swarm:
        pids = [swarm.peers[0].pid, *daemons(swarm)]
        swarm.freeze(0)
        assert eventually(lambda: [state(pid) for pid in pids] == ["T", "T"])
        assert swarm.initial_peers == []
        swarm.resume(0)
        assert eventually(lambda: "T" not in [state(pid) for pid in pids])
        swarm.freeze(0)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5, "a frozen peer can't drain and is killed at once"
    assert eventually(lambda: all(is_gone(pid) for pid in pids))


def test_drain_gives_the_exit_code_or_a_deadline(command: Sequence[str]) -> None:
    with LocalSwarm("m", THIRDS[:1], command=command) as swarm:
        assert swarm.drain(0) == 0
        assert not swarm.peers[0].alive
    with LocalSwarm("m", THIRDS[:1], command=command, extra_args=["--stubborn"], stop_s=0.2) as swarm:
        with pytest.raises(DeadlineExceeded, match=r"peer 0 \[0:10\] has not left after 0.2 s"):
            swarm.drain(0, timeout_s=0.2)
        pid = swarm.peers[0].pid
    assert is_gone(pid)


def test_a_peer_that_ends_early_is_an_error_with_its_last_words(command: Sequence[str]) -> None:
    with pytest.raises(SwarmError, match=r"peer 0 \[0:10\] ended with exit code 1:\nloading 0:10\nout of luck"):
        LocalSwarm("m", THIRDS, command=command, extra_args=["--crash"]).start()


def test_an_error_that_the_peer_reports_keeps_its_class(command: Sequence[str]) -> None:
    with pytest.raises(ModelError, match=r"peer 0 \[0:10\]: no such weights"):
        LocalSwarm("m", THIRDS, command=command, extra_args=["--refuse"]).start()


def test_a_peer_that_never_gets_ready_is_stopped(command: Sequence[str], tmp_path: Path) -> None:
    swarm = LocalSwarm("m", THIRDS, command=command, extra_args=["--hang"], start_s=0.5, log_dir=tmp_path)
    with pytest.raises(DeadlineExceeded, match=r"peer 0 \[0:10\] is not ready after 0.5 s:\nloading 0:10"):
        swarm.start()
    assert swarm.peers == []


def test_a_swarm_needs_ranges_and_starts_once(command: Sequence[str]) -> None:
    with pytest.raises(BadRequest):
        LocalSwarm("m", [])
    with LocalSwarm("m", THIRDS[:1], command=command) as swarm, pytest.raises(BadRequest):
        swarm.start()


@pytest.mark.parametrize("frozen", [False, True])
def test_no_process_outlives_an_owner_that_is_killed(command: Sequence[str], frozen: bool) -> None:
    """Not even a daemon in a group of its own that is stopped just then, and so can't end by itself."""
    owner_code = f"""
import time
from swarm.local import LocalSwarm
from swarm.types import LayerRange
apart = ["--apart"] if {frozen} else []
swarm = LocalSwarm("m", [LayerRange(0, 1), LayerRange(1, 2)], command={list(command)!r}, extra_args=apart)
swarm.start()
if {frozen}:
    swarm.freeze(0)
    swarm.freeze(1)
for peer in swarm.peers:
    print(peer.pid, peer.child.event("ready", 0)["daemon"], end=" ", flush=True)
print(flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", owner_code], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 4
        assert not any(is_gone(pid) for pid in pids)
        os.kill(owner.pid, signal.SIGKILL)
    assert eventually(lambda: all(is_gone(pid) for pid in pids))


def test_those_that_load_are_told_of_in_one_line(
    command: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "PROGRESS_S", 0.1)
    said: list[str] = []
    extra = {1: ("--hang",), 2: ("--hang",)}
    swarm = LocalSwarm("m", THIRDS, command=command, args_of=extra, start_s=1.0, log_dir=tmp_path, report=said.append)
    with pytest.raises(DeadlineExceeded):
        swarm.start()
    told = [line for line in said if "loading" in line]
    assert told
    assert all(line.startswith("peer 1 [10:20], peer 2 [20:30]: loading, ") for line in told)
    assert told[-1].endswith(" s  loading 10:20")
