"""Faults in a local swarm of real processes, and whether the tokens stay the same.

A trial (``swarm.faults``) is one generation with one fault or several. Its tokens are compared with those of an
undisturbed run of the same request on the same swarm.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterable, Sequence

import psutil

from swarm.client import AsyncClient, AsyncStream, Generation
from swarm.errors import DeadlineExceeded, SwarmError
from swarm.faults import AT_ONCE_S, Fault, Observation, Trial, judge
from swarm.info import describe
from swarm.local import LocalPeer, LocalSwarm
from swarm.multiaddrs import peer_addresses
from swarm.session import GenerationRequest, RouteChanged
from swarm.types import LayerRange, PeerId, PeerState, Route

WAKE_AFTER_TOKENS = 10
"""A frozen peer goes on when this many more tokens have come, or at the end: its late frames must do no harm."""
KNOWN_S = 0.02
"""How often it is seen whether a peer that is to be struck has been reported ready."""
SETTLE_S = 40.0
"""For peers that joined to be seen, and for stages to be freed."""


class Chaos:
    """Carries trials out on a started local swarm with spares. All methods are for one event loop."""

    def __init__(
        self, swarm: LocalSwarm, client: AsyncClient, requests: tuple[GenerationRequest, GenerationRequest]
    ) -> None:
        """``requests``: the greedy and the sampled one."""
        self.swarm = swarm
        self._client = client
        self._requests = requests
        self._expected: dict[bool, Generation] = {}
        """For greedy and for sampled."""
        self._complement = [peer.layers for peer in swarm.peers]

    async def undisturbed(self) -> Generation:
        """Run both requests; the first run also warms everything up. Returns the greedy one."""
        await self._generate(False)
        for sampled in (True, False):
            self._expected[sampled] = generation = await self._generate(sampled)
        return generation

    async def _generate(self, sampled: bool) -> Generation:
        stream = AsyncStream(self._client, self._requests[sampled], ())
        async for _ in stream:
            pass
        assert stream.result is not None  # it is set when the iteration ends without an error
        return stream.result

    async def run(self, number: int, trial: Trial) -> list[Observation]:
        """One observation for each fault. Raises only when the swarm itself can't be mended afterwards."""
        for fault in trial.faults:
            if fault.kind == "replacement":  # a third one, or the session has to wait for a peer to start
                ranges = {peer.layers for peer in self.swarm.peers}
                await self.mend([*self._complement, sorted(ranges)[fault.hop % len(ranges)]])
        ordeal = _Ordeal(self, number, trial)
        restarting = asyncio.create_task(self._restart_dead()) if len(trial.faults) > 1 else None
        try:
            await ordeal.run(AsyncStream(self._client, self._requests[trial.sampled], ()))
        finally:
            if restarting is not None:
                restarting.cancel()
                await asyncio.gather(restarting, return_exceptions=True)
        ordeal.judge()
        return ordeal.observations

    async def _restart_dead(self) -> None:
        """While a generation with many faults goes on. With one fault it would only disturb what is measured."""
        while True:
            if missing := self._missing(self._complement):
                await asyncio.to_thread(self.swarm.add, *missing)
            await asyncio.sleep(0.2)

    def _missing(self, complement: Sequence[LayerRange]) -> list[LayerRange]:
        missing = list(complement)
        for peer in self.swarm.peers:
            if peer.alive and peer.layers in missing:
                missing.remove(peer.layers)
        return missing

    async def mend(self, complement: Sequence[LayerRange] | None = None, *, last: bool = False) -> None:
        """Wake up what is frozen, and start peers until each range has as many as at first, or as in ``complement``.

        After the ``last`` trial nobody needs new ones.
        """
        for index, peer in enumerate(self.swarm.peers):
            if peer.alive and peer.frozen:
                self.swarm.resume(index)
        for index, peer in enumerate(self.swarm.peers):
            if peer.alive and not await self._answers(peer):
                await asyncio.to_thread(self.swarm.kill, index)
        if last:
            return
        if missing := self._missing(complement or self._complement):
            await asyncio.to_thread(self.swarm.add, *missing)
        await self.all_seen()

    async def _answers(self, peer: LocalPeer) -> bool:
        """False for one that is on its way out, or that never recovered."""
        for address in peer_addresses(peer.addresses):
            with contextlib.suppress(SwarmError):
                description = await describe(self._client.transport, address, self._client.settings)
                return description.state == PeerState.SERVING
        return False

    async def all_seen(self) -> None:
        living = {peer.peer_id for peer in self.swarm.peers if peer.alive}
        deadline = _now() + SETTLE_S
        while unseen := living - {a.peer.peer_id for a in await self._client.peers() if a.state is PeerState.SERVING}:
            if _now() > deadline:
                named = ", ".join(peer[-6:] for peer in unseen)
                raise DeadlineExceeded(f"{named} joined, and after {SETTLE_S:.0f} s are not on the DHT")
            await asyncio.sleep(0.2)

    async def stages_left(self) -> int:
        """Stages that living peers still hold, once they had the time to free them."""
        deadline = _now() + SETTLE_S
        while True:
            left = 0
            for address in peer_addresses(self.swarm.initial_peers):
                left += (await describe(self._client.transport, address, self._client.settings)).sessions
            if not left or _now() > deadline:
                return left
            await asyncio.sleep(0.2)

    def daemon_pid(self) -> int:
        return self._client.transport.daemon_pid


class _Ordeal:
    """One trial under way."""

    def __init__(self, chaos: Chaos, number: int, trial: Trial) -> None:
        self.observations: list[Observation] = []
        self._chaos = chaos
        self._number = number
        self._trial = trial
        self._expected = chaos._expected[trial.sampled]
        self._pending = list(trial.faults)
        self._route: Route | None = None
        self._times: list[float] = []
        self._tokens: list[int] = []
        self._rebuilds: list[Observation] = []
        """Whose fault each rebuild was."""
        self._began = 0.0
        self._error = ""
        self._over = False
        self._hunting: Observation | None = None
        self._wake: dict[int, int] = {}
        """Index of a frozen peer -> token at which it goes on."""
        self._replayed: list[list[tuple[LayerRange, int]]] = []

    async def run(self, stream: AsyncStream) -> None:
        self._began = _now()
        async with asyncio.TaskGroup() as tasks:
            try:
                async for event in stream:
                    if isinstance(event, RouteChanged):
                        self._on_route(event, tasks)
                    else:
                        self._times.append(_now())
                        self._tokens.append(event.token_id)
                        self._on_token(event.index, tasks)
            except SwarmError as error:
                self._error = f"{error.code}: {error.message}"
            self._over = True
        if stream.result is not None:
            self._replayed = [list(rebuild.replayed) for rebuild in stream.result.rebuilds]

    def _on_route(self, event: RouteChanged, tasks: asyncio.TaskGroup) -> None:
        before, self._route = self._route, event.route
        if before is None:
            for fault in [fault for fault in self._pending if fault.kind == "prefill"]:
                self._pending.remove(fault)
                delay = fault.share * self._expected.timings.ttft_s
                tasks.create_task(self._later(delay, fault, tasks))
            return
        if self.observations:
            self._rebuilds.append(self.observations[-1])
        known = {hop.peer.peer_id for hop in before.hops}
        fresh = [hop.peer.peer_id for hop in event.route.hops if hop.peer.peer_id not in known]
        if self._hunting is not None and fresh:
            seen, self._hunting = self._hunting, None
            tasks.create_task(self._hunt(fresh[0], seen, tasks))

    def _on_token(self, index: int, tasks: asyncio.TaskGroup) -> None:
        while self._pending and self._pending[0].token <= index:
            fault = self._pending.pop(0)
            tasks.create_task(self._later(fault.share * self._pass_s(), fault, tasks))
        for peer, token in list(self._wake.items()):
            if token <= index:
                del self._wake[peer]
                self._chaos.swarm.resume(peer)

    def _pass_s(self) -> float:
        """The shortest time of a pass through all hops, so far: the next one may be as short, and the last."""
        gaps_s = (after - before for before, after in itertools.pairwise(self._times))
        return min((gap_s for gap_s in gaps_s if gap_s > AT_ONCE_S), default=0.0)

    async def _later(self, delay_s: float, fault: Fault, tasks: asyncio.TaskGroup) -> None:
        await asyncio.sleep(delay_s)
        if await self._all_known(lambda: [hop.peer.peer_id for hop in self._route.hops] if self._route else []):
            self._strike(fault, tasks)
        else:
            self._pending.append(fault)

    async def _hunt(self, victim: PeerId, seen: Observation, tasks: asyncio.TaskGroup) -> None:
        if await self._all_known(lambda: [victim]):
            self._kill(victim, seen, tasks)

    async def _all_known(self, peers: Callable[[], Iterable[PeerId]]) -> bool:
        """Waits until all can be struck: one that was started in the middle may be on the route before those that were
        started with it are ready. False: the generation is over."""
        while not self._over:
            if {peer.peer_id for peer in self._chaos.swarm.peers}.issuperset(peers()):
                return True
            await asyncio.sleep(KNOWN_S)
        return False

    def _strike(self, fault: Fault, tasks: asyncio.TaskGroup) -> None:
        assert self._route is not None
        seen = Observation(self._number, self._trial.sampled, fault.kind, len(self._tokens) - 1)
        self.observations.append(seen)
        hops = self._route.hops
        victim = hops[fault.hop % len(hops)].peer.peer_id
        if fault.kind in ("kill", "prefill", "replacement"):
            self._hunting = seen if fault.kind == "replacement" else None
            self._kill(victim, seen, tasks)
        elif fault.kind == "two":
            self._kill(victim, seen, tasks)
            other = hops[(fault.hop + 1) % len(hops)].peer.peer_id
            if other != victim:
                self._kill(other, seen, tasks)
        elif fault.kind == "freeze":
            index = self._index(victim, seen)
            self._chaos.swarm.freeze(index)
            self._wake[index] = len(self._tokens) + WAKE_AFTER_TOKENS
        elif fault.kind == "drain":
            tasks.create_task(self._drain(self._index(victim, seen), seen))
        elif fault.kind == "p2pd":
            daemon = _daemon_of(self._chaos.swarm.peers[self._index(victim, seen)].pid)
            os.kill(daemon, signal.SIGKILL)
        else:
            seen.hit.append("own p2pd")
            os.kill(self._chaos.daemon_pid(), signal.SIGKILL)

    def _index(self, victim: PeerId, seen: Observation) -> int:
        index = next(i for i, peer in enumerate(self._chaos.swarm.peers) if peer.peer_id == victim)
        seen.hit.append(f"{victim[-6:]} [{self._chaos.swarm.peers[index].layers}]")
        return index

    def _kill(self, victim: PeerId, seen: Observation, tasks: asyncio.TaskGroup) -> None:
        index = self._index(victim, seen)
        self._chaos.swarm.peers[index].child.signal(signal.SIGKILL)  # now; what is left to do is no part of the stall
        tasks.create_task(asyncio.to_thread(self._chaos.swarm.kill, index))

    async def _drain(self, index: int, seen: Observation) -> None:
        try:
            code = await asyncio.to_thread(self._chaos.swarm.drain, index)
            seen.note = f"exit code {code}"
        except SwarmError as error:
            seen.note = error.message

    def judge(self) -> None:
        error = self._error or (f"{self._pending[0].kind} did not happen" if self._pending else "")
        for fault in self._pending:
            self.observations.append(Observation(self._number, self._trial.sampled, fault.kind, len(self._tokens) - 1))
        judge(
            self.observations,
            self._tokens,
            self._times,
            self._expected.token_ids,
            began=self._began,
            ttft_s=self._expected.timings.ttft_s,
            error=error,
        )
        for seen, replayed in zip(self._rebuilds, self._replayed, strict=False):
            seen.replayed += replayed


def _daemon_of(pid: int) -> int:
    return next(int(child.pid) for child in psutil.Process(pid).children() if child.name() == "p2pd")


def _now() -> float:
    return asyncio.get_running_loop().time()
