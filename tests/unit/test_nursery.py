"""Peers as forks of one process: they behave as if they had been started by themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import psutil
import pytest

from swarm.children import Child, Guard
from swarm.errors import SwarmError
from swarm.nursery import Forked, Nursery

pytestmark = pytest.mark.skipif(not Nursery.possible(), reason="forks are for Linux")

ENV = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")} | {"PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(ENV) as nursery:
        yield nursery


@pytest.fixture
def guard() -> Iterator[Guard]:
    with Guard() as guard:
        yield guard


def forked(nursery: Nursery, guard: Guard, tmp_path: Path, *args: str, env: Mapping[str, str] = ENV) -> Child:
    fork = partial(nursery.fork, args, env)
    return Child.spawn("it", ["false"], guard, tmp_path / "log", env, fork)


def test_its_arguments_streams_and_exit_code_are_its_own(nursery: Nursery, guard: Guard, tmp_path: Path) -> None:
    child = forked(nursery, guard, tmp_path, "serve", "--json", "--layers", "3:1")
    with pytest.raises(SwarmError, match="3:1"):
        child.event("ready", 20)
    assert child.wait(20) == 2
    assert child.newest("error")["code"] == "config"
    assert "3:1" in child.tail()
    child.bury()


def test_so_is_its_environment(nursery: Nursery, guard: Guard, tmp_path: Path) -> None:
    child = forked(nursery, guard, tmp_path, "serve", env=ENV | {"SWARM_PEER_THREADS": "many"})
    assert child.wait(20) == 2
    assert "SWARM_PEER_THREADS" in child.tail()
    child.bury()


def waiting(nursery: Nursery, tmp_path: Path) -> Forked:
    """One that nobody has let go on."""
    with (tmp_path / "log").open("wb") as stderr:
        peer = nursery.fork(["--help"], ENV, stderr)
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


def test_it_ends_if_its_owner_goes_before(nursery: Nursery, tmp_path: Path) -> None:
    peer = waiting(nursery, tmp_path)
    with peer.stdout:
        peer.stdin.close()
        assert peer.wait(20) == 1
        assert peer.stdout.read() == b""


def test_one_that_is_killed_is_told_of(nursery: Nursery, guard: Guard, tmp_path: Path) -> None:
    child = forked(nursery, guard, tmp_path, "serve", "--layers", "0:1")
    assert child.alive
    child.signal(signal.SIGKILL)
    assert child.wait(20) == -signal.SIGKILL
    assert not child.alive
    child.bury()


def test_without_its_nursery_a_peer_lives_on_and_others_are_started_by_themselves(guard: Guard, tmp_path: Path) -> None:
    with Nursery(ENV) as nursery:
        peer = waiting(nursery, tmp_path)
    with peer.stdout, peer.stdin:
        began = time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired):
            peer.wait(0.5)
        assert time.monotonic() - began > 0.4
        psutil.Process(peer.pid).kill()
        assert peer.wait(20) == -signal.SIGKILL
    child = forked(nursery, guard, tmp_path, "serve")
    assert child.wait(20) == 1  # of the command
    child.bury()
