"""The transport over real p2pd daemons on the loopback: what arrives, what is lost, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import uvloop

from swarm import daemon
from swarm.config import DiscoverySettings, LimitSettings, NetworkSettings, Settings, TimeoutSettings
from swarm.daemon_requests import own_addresses
from swarm.errors import Busy, Cancelled, ConfigError, PortInUse, ProtocolError, StreamLost, Unreachable
from swarm.identity import Identity
from swarm.libp2p import Libp2pTransport
from swarm.multiaddrs import peer_address
from swarm.transport import CONTROL, INFO, LINK, Stream
from swarm.types import PeerAddress, PeerId
from tests.processes import is_gone

pytestmark = [pytest.mark.live, pytest.mark.timeout(30)]

ROOT = Path(__file__).parents[2]
SETTINGS = Settings(timeouts=replace(TimeoutSettings(), connect_s=1.5, send_s=1.0, daemon_start_s=20.0, info_s=0.5))


@dataclass(frozen=True, slots=True)
class Remote:
    process: subprocess.Popen[str]
    daemon_pid: int
    address: PeerAddress


@contextlib.contextmanager
def remote_peer(maddr: str = "/ip4/127.0.0.1/tcp/0") -> Iterator[Remote]:
    command = [sys.executable, str(Path(__file__).with_name("echo_peer.py")), maddr]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        try:
            yield Remote(process, facts["daemon_pid"], peer_address(facts["addresses"][0]))
        finally:
            for pid in (process.pid, facts["daemon_pid"]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            process.kill()
            wait_gone(facts["daemon_pid"])


def wait_gone(pid: int, limit_s: float = 5.0) -> None:
    end = time.monotonic() + limit_s
    while not is_gone(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.02)


async def eventually(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110  # the condition is somebody else's state
            await asyncio.sleep(0)


async def echo(stream: Stream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)


def client(settings: Settings = SETTINGS) -> Libp2pTransport:
    return Libp2pTransport(Identity.ephemeral(), settings, listen=False)


def server(settings: Settings = SETTINGS) -> Libp2pTransport:
    return Libp2pTransport(Identity.ephemeral(), settings)


def runtime_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("swarm-p2p-*"))


@pytest.fixture
def _own_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In which nobody else starts daemons, or sweeps."""
    with tempfile.TemporaryDirectory(prefix="swarm-test-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield


def folder_of(transport: Libp2pTransport) -> Path:
    return Path(transport.p2p.daemon_listen_maddr["unix"]).parent


# --- frames ----------------------------------------------------------------------------------------------------------


def test_two_processes_exchange_frames_both_ways() -> None:
    async def main(remote: Remote) -> None:
        async with client() as transport:
            stream = await transport.open(remote.address, "echo")
            assert stream.remote == remote.address.peer_id
            frames = [b"", b"x", os.urandom(2300), os.urandom(70_000), os.urandom(5 * 1024 * 1024)]
            for frame in frames:
                await stream.send(frame)
            assert [await stream.receive() for _ in frames] == frames
            await stream.close()
            assert transport.streams == 0

            bye = await transport.open(remote.address, "bye")
            assert [await bye.receive(), await bye.receive()] == [b"first", None]
            await bye.close()

            cut = await transport.open(remote.address, "cut")
            await asyncio.gather(cut.receive(), return_exceptions=True)  # an abort may overtake the frame before it
            with pytest.raises(StreamLost, match="without its end frame"):
                await cut.receive()
            failing = await transport.open(remote.address, "fail")
            with pytest.raises(StreamLost):
                await failing.receive()
            again = await transport.open(remote.address, "bye")  # the bug in that handler hurt nobody else
            assert await again.receive() == b"first"
            await again.close()
            assert transport.streams == 0

    with remote_peer() as remote:
        uvloop.run(main(remote))


def test_a_process_opens_streams_to_itself() -> None:
    """A peer that owns a session may be a hop of its route."""

    async def main() -> None:
        async with client() as transport:
            await transport.serve("echo", echo)
            stream = await transport.open(transport.local, "echo")
            assert stream.remote == transport.local.peer_id
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
            await stream.close()
            unknown = await transport.open(transport.local, "unknown")
            with pytest.raises(StreamLost):
                await unknown.receive()
            unknown.abort()
            await asyncio.sleep(0.05)
            assert transport.streams == 0

    uvloop.run(main())


def test_closing_delivers_the_end_frame_even_while_the_remote_is_sending() -> None:
    async def main() -> None:
        ends: list[object] = []

        async def chatty(stream: Stream) -> None:
            async def talk() -> None:
                with contextlib.suppress(StreamLost):
                    while True:
                        await stream.send(b"heartbeat")
                        await asyncio.sleep(0)

            talking = asyncio.create_task(talk())
            try:
                ends.append(await stream.receive())
            except StreamLost as error:
                ends.append(error)
            talking.cancel()

        async with server() as one, client() as two:
            await one.serve("chatty", chatty)
            for _ in range(20):
                stream = await two.open(one.local, "chatty")
                for _ in range(20):
                    await stream.receive()
                await stream.close()
            await eventually(lambda: len(ends) == 20)
        assert ends == [None] * 20

    asyncio.run(main())


def test_a_frame_over_the_receivers_limit_is_refused_by_its_header() -> None:
    async def main(remote: Remote) -> None:
        async with client(replace(SETTINGS, limits=LimitSettings(max_frame_bytes=1024 * 1024))) as transport:
            stream = await transport.open(remote.address, "big")
            with pytest.raises(ProtocolError, match="announced a frame of 2097152 bytes"):
                await stream.receive()
            assert transport.streams == 0

    with remote_peer() as remote:
        asyncio.run(main(remote))


def test_latency_and_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    async def main(remote: Remote) -> tuple[float, float]:
        async with client() as transport:
            stream = await transport.open(remote.address, "echo")
            frame, times = os.urandom(2300), []
            for _ in range(1000):
                start = time.perf_counter()
                await stream.send(frame)
                await stream.receive()
                times.append((time.perf_counter() - start) / 2)
            large = os.urandom(1024 * 1024)
            start = time.perf_counter()

            async def send() -> None:
                for _ in range(32):
                    await stream.send(large)

            async with asyncio.TaskGroup() as group:
                group.create_task(send())
                for _ in range(32):
                    await stream.receive()
            rate = 64 / (time.perf_counter() - start)
            await stream.close()
            return statistics.median(times), rate

    with remote_peer() as remote:
        one_way_s, rate = uvloop.run(main(remote))
    with capsys.disabled():
        print(f"\none way, 2.3 KB, p50: {one_way_s * 1e6:.0f} us; echoed both ways: {rate:.0f} MiB/s")
    assert one_way_s < 0.01, "a decode step's hop"


# --- within a machine ------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def frozen(*transports: Libp2pTransport) -> AsyncIterator[None]:
    """Their daemons."""
    for transport in transports:
        os.kill(transport.daemon_pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for transport in transports:
            os.kill(transport.daemon_pid, signal.SIGCONT)


OFF = replace(SETTINGS, network=NetworkSettings(unix_sockets=False))
ELSEWHERE = replace(SETTINGS, network=NetworkSettings(announce_maddrs=("/ip4/127.0.0.1/tcp/4001",)))


@pytest.mark.parametrize(
    ("one_has", "two_has", "protocol", "past"),
    [
        (SETTINGS, SETTINGS, LINK, True),
        (SETTINGS, SETTINGS, CONTROL, True),
        (SETTINGS, SETTINGS, INFO, False),  # some questions are about the network
        (OFF, SETTINGS, LINK, False),
        (SETTINGS, OFF, LINK, False),
        (SETTINGS, ELSEWHERE, LINK, False),  # its side of a link is to be as slow as the other one
    ],
)
def test_streams_of_sessions_go_past_the_daemons(
    one_has: Settings, two_has: Settings, protocol: str, past: bool
) -> None:
    async def main() -> None:
        async with server(one_has) as one, server(two_has) as two:
            await one.serve(protocol, echo)
            if not past:
                await two.connect(one.local)  # so that it could be opened past frozen daemons, too
            async with frozen(one, two):
                if past:
                    stream = await two.open(one.local, protocol)
                    for size in (0, 2300, 5 * 1024 * 1024):
                        await stream.send(bytes(size))
                        assert await asyncio.wait_for(stream.receive(), 5) == bytes(size)
                    assert stream.remote == one.local.peer_id
                else:
                    with pytest.raises((Unreachable, TimeoutError)):
                        await asyncio.wait_for((await two.open(one.local, protocol)).receive(), 1)

    uvloop.run(main())


def test_a_peer_that_announces_another_address_is_reached_there() -> None:
    async def main() -> None:
        async with server(ELSEWHERE) as one, server() as two:
            await one.serve(LINK, echo)
            with pytest.raises(Unreachable):
                await two.open(one.local, LINK)

    uvloop.run(main())


def test_streams_past_the_daemon_end_with_it_like_all_others() -> None:
    async def main() -> None:
        async with server() as one, client() as two:
            await one.serve(LINK, echo)
            stream = await two.open(one.local, LINK)
            await stream.send(b"x")
            assert await stream.receive() == b"x"
            os.kill(one.daemon_pid, signal.SIGKILL)
            with pytest.raises(StreamLost):
                await asyncio.wait_for(stream.receive(), 5)
            assert await one.ready() == 1
            assert (one.streams, two.streams) == (0, 0)

    uvloop.run(main())


# --- death and silence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["python", "daemon"])
def test_a_killed_remote_is_seen_at_once(victim: str) -> None:
    async def main(remote: Remote) -> None:
        async with client() as transport:
            reading = await transport.open(remote.address, "mute")
            await reading.send(b"x")
            pid = remote.process.pid if victim == "python" else remote.daemon_pid
            waiting = asyncio.create_task(reading.receive())
            await asyncio.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(StreamLost):
                await asyncio.wait_for(waiting, 2)
            if victim == "python":
                with pytest.raises((Unreachable, StreamLost)):
                    await (await transport.open(remote.address, "mute")).receive()
                wait_gone(remote.daemon_pid)
            assert transport.streams == 0

    with remote_peer() as remote:
        asyncio.run(main(remote))


@pytest.mark.parametrize("victim", ["python", "daemon"])
def test_a_frozen_remote_meets_deadlines(victim: str) -> None:
    async def main(remote: Remote) -> None:
        async with client() as transport:
            stream = await transport.open(remote.address, "echo")
            os.kill(remote.process.pid if victim == "python" else remote.daemon_pid, signal.SIGSTOP)

            async def flood() -> None:
                for _ in range(64):
                    await stream.send(bytes(1024 * 1024))

            start = time.monotonic()
            with pytest.raises(StreamLost, match="took nothing"):
                await flood()
            # a second stream may open (no round trip is needed), but nothing comes
            with pytest.raises((Unreachable, TimeoutError)):
                await asyncio.wait_for((await transport.open(remote.address, "echo")).receive(), 0.5)
            assert time.monotonic() - start < 8

    with remote_peer() as remote:
        asyncio.run(main(remote))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_own_daemon_is_replaced_on_the_same_address(how: signal.Signals) -> None:
    quick = replace(SETTINGS, discovery=replace(DiscoverySettings(), ping_period_s=0.2))

    async def main() -> None:
        restarted = asyncio.Event()

        async def on_restart() -> None:
            restarted.set()

        async with server(quick) as one, client() as two:
            await one.serve("echo", echo)
            one.on_restart(on_restart)
            before, first_pid = one.local, one.daemon_pid
            stream = await two.open(before, "echo")
            os.kill(first_pid, how)
            if how is signal.SIGKILL:
                with pytest.raises(StreamLost):
                    await asyncio.wait_for(stream.receive(), 2)
            await asyncio.wait_for(restarted.wait(), 10)
            assert one.alive
            assert one.restarts == 1
            assert one.streams == 0
            assert one.local == before
            assert one.daemon_pid != first_pid
            assert is_gone(first_pid)
            async with asyncio.timeout(10):  # libp2p backs off from an address that failed
                while True:
                    with contextlib.suppress(Unreachable):
                        again = await two.open(before, "echo")
                        break
                    await asyncio.sleep(0.1)
            await again.send(b"back")
            assert await again.receive() == b"back"
            await again.close()

    asyncio.run(main())


def test_a_daemon_that_dies_again_is_replaced_though_others_still_see_to_the_last_restart() -> None:
    """They ask peers over the network, some of which don't answer: meanwhile all would seem to be unreachable."""

    async def main() -> None:
        async with client() as one:
            told: list[int] = []

            async def busy() -> None:
                told.append(one.restarts)
                await asyncio.Event().wait()

            one.on_restart(busy)
            for restart in (1, 2, 3):
                os.kill(one.daemon_pid, signal.SIGKILL)
                await eventually(lambda: one.restarts == restart and told[-1:] == [restart])  # noqa: B023

    asyncio.run(main())


def test_streams_of_a_dead_daemon_are_lost_and_new_ones_refused() -> None:
    async def main(remote: Remote) -> None:
        async with client() as transport:
            stream = await transport.open(remote.address, "mute")
            os.kill(transport.daemon_pid, signal.SIGKILL)
            with pytest.raises(StreamLost):
                await asyncio.wait_for(stream.receive(), 2)
            await eventually(lambda: not transport.alive)
            with pytest.raises(Unreachable, match="own p2p daemon"):
                await transport.open(remote.address, "mute")
            await eventually(lambda: transport.alive)
            echo = await transport.open(remote.address, "echo")
            await echo.send(b"again")
            assert await echo.receive() == b"again"

    with remote_peer() as remote:
        asyncio.run(main(remote))


def test_addresses_that_the_daemon_comes_to_know_later_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine went to another network, or its router forwards a port by now."""
    quick = replace(SETTINGS, discovery=replace(DiscoverySettings(), ping_period_s=0.05))

    async def main() -> None:
        async with server(quick) as one, client(quick) as two:
            suffix = f"/p2p/{one.identity.peer_id}"
            before = one.local

            async def elsewhere(socket: str, timeout_s: float) -> list[str] | None:
                known = await own_addresses(socket, timeout_s)
                return known and [*known, "/unix/tmp/x", "/ip4/192.0.2.7/tcp/1"]

            with monkeypatch.context() as patch:
                patch.setattr(daemon, "own_addresses", elsewhere)
                told = f"/ip4/192.0.2.7/tcp/1{suffix}", *before.multiaddrs
                await eventually(lambda: one.local.multiaddrs == told)
            await eventually(lambda: one.local == before)
            assert (one.restarts, two.restarts) == (0, 0)
            assert two.local.multiaddrs == ()

    asyncio.run(main())


def test_a_daemon_comes_back_though_its_old_files_were_cleaned_away() -> None:
    """What nobody has touched for some days does not stay in a temporary folder."""

    async def main() -> None:
        async with server() as one:
            before = one.local
            (folder_of(one) / "identity.key").unlink()
            os.kill(one.daemon_pid, signal.SIGKILL)
            await eventually(lambda: one.restarts == 1)
            assert one.local == before

    asyncio.run(main())


def test_what_is_served_first_while_the_daemon_is_restarted_is_served_then() -> None:
    async def main() -> None:
        async def bye(stream: Stream) -> None:
            await stream.send(b"bye")

        async with server() as one, client() as two:
            os.kill(one.daemon_pid, signal.SIGKILL)
            await eventually(lambda: not one.alive)
            await one.serve("bye", bye)
            assert await one.ready() == 1
            stream = await two.open(one.local, "bye")
            assert await asyncio.wait_for(stream.receive(), 5) == b"bye"

    asyncio.run(main())


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_can_not_be_dialled_is_unreachable_in_time() -> None:
    nobody = Identity.ephemeral().peer_id

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
            dead_port, silent_port = closed.getsockname()[1], silent.getsockname()[1]
            closed.close()
            async with server() as one, client() as two:
                cases = {
                    "no usable address": PeerAddress(nobody, ("/ip4/nowhere/tcp/1",)),
                    "of another peer": PeerAddress(nobody, one.local.multiaddrs),
                    "can't reach": PeerAddress(nobody, (f"/ip4/127.0.0.1/tcp/{dead_port}",)),
                    "within": PeerAddress(Identity.ephemeral().peer_id, (f"/ip4/127.0.0.1/tcp/{silent_port}",)),
                    "no peer id": PeerAddress(PeerId("Qmjunk"), one.local.multiaddrs),
                    "does not speak": one.local,
                    "address of peer|can't reach|within": PeerAddress(Identity.ephemeral().peer_id),
                }
                for words, peer in cases.items():
                    start = time.monotonic()
                    with pytest.raises(Unreachable, match=words):
                        await two.open(peer, "nothing")
                    assert time.monotonic() - start < 2.5, words
                # a bad address beside a good one is left out
                await two.connect(PeerAddress(one.local.peer_id, ("junk", *one.local.multiaddrs)))
                # and a peer that is connected needs no address
                with pytest.raises(Unreachable, match="does not speak"):
                    await two.open(PeerAddress(one.local.peer_id), "nothing")
                assert two.streams == 0

    asyncio.run(main())


def test_a_peer_that_is_not_there_is_not_dialled_by_the_daemon_again_and_again() -> None:
    """libp2p's back-off grows with every dial that fails, and would keep out a peer that is back."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            away = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}"
        async with server() as one, server() as two:
            peer = PeerAddress(two.local.peer_id, (away,))
            for words in ("connection refused", "nothing listens", "nothing listens"):
                with pytest.raises(Unreachable, match=words):
                    await one.connect(peer)
            await two.connect(one.local)
            await one.connect(peer)  # by the connection that it made

    asyncio.run(main())


def test_what_is_no_peer_id_is_refused_each_time_it_is_dialled() -> None:
    """An owner may name anything as the next hop: what a stage's task raises beside our own errors ends the peer."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            away = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}"
        async with server() as one:
            for _ in range(3):
                with pytest.raises(Unreachable):
                    await one.open(PeerAddress(PeerId("no peer!"), (away,)), "nothing")

    asyncio.run(main())


@pytest.mark.usefixtures("_own_temporary_folder")
def test_a_taken_port_is_named_and_an_own_one_kept() -> None:
    async def main() -> None:
        async with server() as one:
            port = one.local.multiaddrs[0].split("/")[4]
            maddr = f"/ip4/127.0.0.1/tcp/{port}"
            with pytest.raises(PortInUse, match=f"tcp port {port} on 127.0.0.1"):
                async with server(replace(SETTINGS, network=NetworkSettings(host_maddrs=(maddr,)))):
                    pass
        async with server(replace(SETTINGS, network=NetworkSettings(host_maddrs=(maddr,)))) as again:
            assert again.local.multiaddrs[0].startswith(maddr)
        for bad in ("junk", "/dns4/localhost/tcp/0", "/ip4/192.0.2.1/tcp/0"):
            with pytest.raises(ConfigError):
                async with server(replace(SETTINGS, network=NetworkSettings(host_maddrs=(bad,)))):
                    pass

    asyncio.run(main())
    assert runtime_folders() == set()


@pytest.mark.parametrize("end", ["", "/", "/p2p/{}"])
def test_an_announced_address_may_come_with_the_peer_id_as_peers_tell_it(end: str) -> None:
    async def main() -> None:
        one = server()
        told = "/ip4/192.0.2.1/tcp/4001" + end.format(one.identity.peer_id)
        settings = replace(SETTINGS, network=NetworkSettings(announce_maddrs=(told,)))
        async with Libp2pTransport(one.identity, settings) as announcing:
            assert announcing.local.multiaddrs == (f"/ip4/192.0.2.1/tcp/4001/p2p/{one.identity.peer_id}",)
        settings = replace(SETTINGS, network=NetworkSettings(announce_maddrs=("/ip4/192.0.2.1",)))
        with pytest.raises(ConfigError, match="announce"):
            async with server(settings):
                pass

    asyncio.run(main())


def test_streams_are_counted_before_any_work() -> None:
    async def main(remote: Remote) -> None:
        async with client(replace(SETTINGS, limits=LimitSettings(max_streams=10))) as transport:
            streams = [await transport.open(remote.address, "echo") for _ in range(8)]  # the peer takes 8 of one peer
            for stream in streams:
                await stream.send(b"x")
                assert await stream.receive() == b"x"
            ninth = await transport.open(remote.address, "echo")
            with pytest.raises(StreamLost):
                await asyncio.wait_for(ninth.receive(), 2)
            await streams.pop().close()
            await asyncio.sleep(0.2)
            streams.append(await transport.open(remote.address, "echo"))
            await streams[-1].send(b"y")
            assert await streams[-1].receive() == b"y"
            streams += [await transport.open(remote.address, "echo") for _ in range(2)]
            with pytest.raises(Busy, match="max_streams"):
                await transport.open(remote.address, "echo")
            for stream in streams:
                stream.abort()
            assert transport.streams == 0

    with remote_peer() as remote:
        asyncio.run(main(remote))


# --- what is left behind ---------------------------------------------------------------------------------------------


def test_nothing_is_left_after_the_end() -> None:
    async def main() -> tuple[int, int, Path]:
        async def never(stream: Stream) -> None:
            await asyncio.sleep(1000)

        async with server() as one, server() as two:
            await one.serve("never", never)
            streams = [await two.open(one.local, "never") for _ in range(5)]
            await streams[0].send(b"x")
            folder = folder_of(one)
            assert folder.stat().st_mode & 0o077 == 0
            pids = one.daemon_pid, two.daemon_pid
        assert not one.alive
        with pytest.raises(Cancelled):
            await one.ready()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return *pids, folder

    first, second, folder = asyncio.run(main())
    assert is_gone(first)
    assert is_gone(second)
    assert not folder.exists()
    assert [child for child in psutil.Process().children() if child.name() == "p2pd"] == []


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.05, 0.1])
def test_a_start_that_is_cancelled_leaves_nothing(after_s: float, caplog: pytest.LogCaptureFixture) -> None:
    me = psutil.Process()
    others = me.children()  # peers of other tests

    async def start() -> None:
        async with client():
            await asyncio.sleep(1000)

    async def main() -> None:
        starting = asyncio.create_task(start())
        await eventually(lambda: me.children() != others)
        await asyncio.sleep(after_s)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert me.children() == others
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert caplog.records == []


@pytest.mark.usefixtures("_own_temporary_folder")
def test_a_killed_process_leaves_no_daemon_and_its_folder_is_swept() -> None:
    with remote_peer() as remote:
        remote.process.kill()
        remote.process.wait()
        wait_gone(remote.daemon_pid, 2.0)
        (left,) = runtime_folders()

    async def main() -> None:
        async with client():
            assert left not in runtime_folders()

    asyncio.run(main())


def test_it_works_in_a_thread_with_uvloop() -> None:
    failures: list[BaseException] = []

    async def main() -> None:
        async with server() as one, client() as two:
            await two.connect(one.local)

    def thread() -> None:
        try:
            uvloop.run(main())
        except BaseException as error:
            failures.append(error)

    worker = threading.Thread(target=thread)
    worker.start()
    worker.join(20)
    assert not worker.is_alive()
    assert failures == []


def test_neither_torch_nor_numpy_nor_scipy_is_loaded() -> None:
    code = (
        "import sys, logging, swarm.dht;"
        "heavy = {'torch', 'numpy', 'scipy', 'transformers', 'hivemind.averaging', 'hivemind.moe'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "import swarm.discovery;"  # has link times in arrays of NumPy
        "assert heavy & set(sys.modules) <= {'numpy'}, heavy & set(sys.modules);"
        "assert logging.getLevelName(30) == 'WARNING';"
        "import hivemind\n"
        "try: hivemind.DHT\n"
        "except AttributeError as error: assert 'imports it before swarm' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=20)
