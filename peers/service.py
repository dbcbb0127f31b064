"""A peer's network side: control streams of owners, links of other peers, questions from anyone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType

import swarm
from peers.answers import Answers
from peers.control import ControlHandler
from peers.delegation import DelegationHandler
from peers.dial_back import DialBack
from peers.executor import Executor
from peers.frame_router import FrameRouter
from peers.probe import Prober, Vouching
from peers.stage_table import StageTable
from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.knowledge import View
from swarm.transport import CONTROL, DELEGATE, INFO, LINK, Transport
from swarm.types import PeerState


class PeerService:
    """Serves the layers of one executor. An ``async with``: leaving it frees every stage."""

    def __init__(
        self,
        transport: Transport,
        executor: Executor,
        view: View,
        settings: Settings,
        files: Mapping[str, bytes] | None = None,
        vouching: Vouching | None = None,
        dial_back: DialBack | None = None,
    ) -> None:
        """``vouching``: without it the peer neither answers probes nor probes others; ``dial_back``: or dials them."""
        self.transport = transport
        self.executor = executor
        self.view = view
        self.settings = settings
        self.files = dict(files or {})
        self._vouching = vouching
        self._dial_back = dial_back
        self.state = PeerState.JOINING
        self._tasks = asyncio.TaskGroup()
        self.table = StageTable(executor, settings, self._tasks)

    async def __aenter__(self) -> PeerService:
        await self._tasks.__aenter__()
        self._router = FrameRouter(self.transport, self.table, self._tasks)
        self.link_prober = self._router.prober(self.view)
        self._sweeper = self._tasks.create_task(self.table.sweep())
        control = ControlHandler(self.table, self._router, lambda: self.state)
        self._delegation = DelegationHandler(self.transport, self.view, self.executor.profile, self.settings)
        prober = None
        if self._vouching is not None:
            prober = Prober(self.transport, self.executor, self.table.budget, self._vouching, self.settings)
        timeouts = self.settings.timeouts
        answers = Answers(self._description, self._delegation.plan, self.files, prober, self._dial_back, timeouts)
        await self.transport.serve(CONTROL, control.handle)
        await self.transport.serve(LINK, self._router.handle_link)
        await self.transport.serve(INFO, answers.handle)
        await self.transport.serve(DELEGATE, self._delegation.handle)
        self.state = PeerState.SERVING
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sweeper.cancel()
        self.table.free_all()
        await self._router.aclose()
        await self._tasks.__aexit__(None, None, None)

    def drain(self) -> None:
        """Take no new sessions, and tell the owners of those that are here at once, so that they move."""
        self.state = PeerState.DRAINING
        self.table.prefixes.close()
        for runner in self.table.runners.values():
            self._tasks.create_task(runner.owner.tell_status(runner.status(draining=True)))

    async def drained(self, *, leaving: bool) -> None:
        """Wait until owners have moved their sessions away.

        A peer that is ``leaving`` takes no more sessions of thin clients, and waits for the ends of those that it owns.
        At one that stays they go on, whatever it serves next.
        """
        if leaving:
            await self._delegation.drained()
        await self.table.empty()

    def _description(self) -> pb.Description:
        profile, layers = self.executor.profile, self.executor.layers
        return pb.Description(
            model=profile.model_id,
            start=layers.start,
            end=layers.end,
            state=self.state,
            version=swarm.__version__,
            profile_json=profile.to_json(),
            files={name: len(data) for name, data in self.files.items()},
            sessions=len(self.table.runners),
            kv_bytes_used=self.table.budget.used_bytes,
            kv_bytes_kept=self.table.budget.kept_bytes,
        )
