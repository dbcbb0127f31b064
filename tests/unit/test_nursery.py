"""Peers as forks of one process: they behave as if they had been started by themselves."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from swarm import nursery as nursery_module
from swarm.children import Child, Guard, inherited_environment
from swarm.errors import SwarmError
from swarm.nursery import Forked, Nursery
from tests.processes import eventually

pytestmark = pytest.mark.skipif(not Nursery.possible(), reason="forks are for Linux")

ENV = inherited_environment() | {"PYTHONUNBUFFERED": "1"}
PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(ENV) as nursery:
        yield nursery


@pytest.fixture
def guard() -> Iterator[Guard]:
    with Guard() as guard:
        yield guard


def forked(nursery: Nursery, guard: Guard, tmp_path: Path, *args: str) -> Child:
    return Child.spawn("it", ["false"], guard, tmp_path / "log", ENV, partial(nursery.fork, args))


def opened(pid: int) -> list[str]:
    """What its file descriptors are."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(descriptor))
        except FileNotFoundError:  # with which the folder itself was read
            continue
    return sorted(found)


def test_its_arguments_streams_and_exit_code_are_its_own(nursery: Nursery, guard: Guard, tmp_path: Path) -> None:
    child = forked(nursery, guard, tmp_path, "serve", "--json", "--layers", "3:1")
    with pytest.raises(SwarmError, match="3:1"):
        child.event("ready", 20)
    assert child.wait(20) == 2
    assert child.newest("error")["code"] == "config"
    assert "3:1" in child.tail()
    child.bury()


def test_its_environment_may_be_large(guard: Guard, tmp_path: Path) -> None:
    large = {name: name * 90_000 for name in "XY"}
    with Nursery(ENV | large | {"SWARM_PEER_THREADS": "many"}) as nursery:
        child = forked(nursery, guard, tmp_path, "serve")
        assert child.wait(20) == 2
    assert "SWARM_PEER_THREADS" in child.tail()
    child.bury()


def waiting(nursery: Nursery, tmp_path: Path) -> Forked:
    """One that nobody has let go on."""
    with (tmp_path / "log").open("wb") as stderr:
        peer = nursery.fork(["--help"], stderr)
    assert peer is not None
    return peer


def test_it_is_the_leader_of_a_session_and_waits_for_a_line(nursery: Nursery, tmp_path: Path) -> None:
    peer = waiting(nursery, tmp_path)
    with peer.stdout, peer.stdin:
        with pytest.raises(subprocess.TimeoutExpired):
            peer.wait(0.3)
        assert os.getsid(peer.pid) == peer.pid
        peer.stdin.write(b"go\n")
        assert peer.wait(20) == peer.poll() == 0
        assert b"swarm-peer" in peer.stdout.read()


def released(peer: Forked) -> bytes:
    """Its owner goes before it has let it go on; what it says."""
    with peer.stdout:
        peer.stdin.close()
        assert peer.wait(20) == 1
        return peer.stdout.read()


def test_it_ends_if_its_owner_goes_before(nursery: Nursery, tmp_path: Path) -> None:
    assert released(waiting(nursery, tmp_path)) == b""


def test_one_that_is_killed_is_told_of(nursery: Nursery, guard: Guard, tmp_path: Path) -> None:
    child = forked(nursery, guard, tmp_path, "serve", "--layers", "0:1")
    assert child.alive
    child.signal(signal.SIGKILL)
    assert child.wait(20) == -signal.SIGKILL
    assert not child.alive
    child.bury()


def test_it_has_nothing_open_of_the_others_and_nobody_keeps_anything_of_it(nursery: Nursery, tmp_path: Path) -> None:
    released(waiting(nursery, tmp_path))  # by now it imports no more
    ours, theirs = opened(os.getpid()), opened(nursery.pid)
    first, second = waiting(nursery, tmp_path), waiting(nursery, tmp_path)
    for peer in (first, second):
        assert len(opened(peer.pid)) == len(set(opened(peer.pid))) == 3, opened(peer.pid)
        assert str(tmp_path / "log") in opened(peer.pid)
    assert not set(opened(first.pid)) & set(opened(second.pid)) - {str(tmp_path / "log")}
    for peer in (first, second):
        released(peer)
    assert opened(os.getpid()) == ours
    assert eventually(lambda: opened(nursery.pid) == theirs)


def test_without_its_nursery_a_peer_lives_on_and_others_are_started_by_themselves(guard: Guard, tmp_path: Path) -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # so this process is its new parent, and one that does not collect it
    try:
        with Nursery(ENV) as nursery:
            peer = waiting(nursery, tmp_path)
        with peer.stdout, peer.stdin:
            began = time.monotonic()
            with pytest.raises(subprocess.TimeoutExpired):
                peer.wait(0.5)
            assert time.monotonic() - began > 0.4
            assert peer.poll() is None
            os.kill(peer.pid, signal.SIGKILL)
            assert eventually(lambda: peer.poll() == -signal.SIGKILL)
        os.waitpid(peer.pid, 0)
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0)
    child = forked(nursery, guard, tmp_path, "serve")
    assert child.wait(20) == 1  # of the command
    child.bury()


def test_so_are_they_if_it_dies_while_it_imports(guard: Guard, tmp_path: Path) -> None:
    with Nursery(ENV) as nursery:
        threading.Timer(0.1, os.kill, [nursery.pid, signal.SIGKILL]).start()
        child = forked(nursery, guard, tmp_path, "serve")
        assert child.wait(20) == 1
        child.bury()


def test_an_answer_that_comes_late_is_not_taken_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Nursery(ENV) as nursery:
        with monkeypatch.context() as impatient, (tmp_path / "log").open("wb") as stderr:
            impatient.setattr(nursery_module, "FORK_S", 0.01)
            assert nursery.fork(["--help"], stderr) is None
        peer = waiting(nursery, tmp_path)
        with peer.stdout, peer.stdin:
            peer.stdin.write(b"go\n")
            assert peer.wait(20) == 0


def test_nobody_waits_for_one_that_still_imports_when_it_is_closed() -> None:
    with Nursery(ENV):
        began = time.monotonic()
    assert time.monotonic() - began < 1.0


def test_at_rest_it_takes_little_memory_and_tells_of_ends_as_before(tmp_path: Path) -> None:
    with Nursery(ENV) as nursery:
        peers = [waiting(nursery, tmp_path) for _ in range(2)]
        assert psutil.Process(nursery.pid).memory_info().rss > 100e6
        released(peers[0])
        nursery.rest()
        assert eventually(lambda: psutil.Process(nursery.pid).memory_info().rss < 40e6)
        with peers[1].stdin, peers[1].stdout:
            peers[1].stdin.write(b"go\n")
            assert [peer.wait(20) for peer in peers] == [1, 0]
        with (tmp_path / "log").open("wb") as stderr:
            assert nursery.fork(["--help"], stderr) is None
