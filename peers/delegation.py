"""This peer as the owner of sessions for thin clients, and as a planner for anyone who asks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator

from google.protobuf.message import DecodeError

from swarm import protocol_pb2 as pb
from swarm.awake import timeout_awake
from swarm.config import Settings
from swarm.coverage import explained
from swarm.delegation import request_from_wire, route_to_wire
from swarm.errors import Busy, NoRoute, ProtocolError, SwarmError
from swarm.health import Health
from swarm.knowledge import View, known
from swarm.models import ModelProfile
from swarm.prefix import Prefixes
from swarm.protocol import check_count, error_to_wire, timing_to_wire
from swarm.routing import plan_route
from swarm.session import RouteChanged, Session
from swarm.transcript import Generated
from swarm.transport import Stream, Transport
from swarm.types import PeerId

logger = logging.getLogger(__name__)

MOST_CLIENTS = 64
"""Thin clients whose texts are remembered."""
MOST_EXCLUDED = 1024
"""Peers that a plan may be asked to do without."""


class DelegationHandler:
    """At most ``limits.max_delegated`` generations at once; more are refused with ``busy``.

    So is everybody once :meth:`drained` was called.
    """

    def __init__(self, transport: Transport, view: View, profile: ModelProfile, settings: Settings) -> None:
        self._transport = transport
        self._view = view
        self._profile = profile
        self._settings = settings
        self._health = Health(settings.recovery.max_penalty_s)
        self._prefixes: OrderedDict[PeerId, Prefixes] = OrderedDict()
        """Of each thin client, those that asked last."""
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.running = 0

    def plan(self, request: pb.PlanRequest) -> pb.RouteNews:
        """The route that a session would take now; raises ``NoRoute`` and ``BadRequest``."""
        check_count(request.exclude, MOST_EXCLUDED, "peers to do without")
        now = asyncio.get_running_loop().time()
        announcements = self._view.announcements()
        try:
            route = plan_route(
                announcements,
                self._profile.num_layers,
                tokens=request.tokens,
                excluded=frozenset(PeerId(peer) for peer in request.exclude),
                knowledge=known(self._view, self._health, now, self._settings.planner),
            )
        except NoRoute as error:
            raise explained(error, announcements, self._profile, self._view.check) from None
        return route_to_wire(RouteChanged(0, route, "planned"))

    async def drained(self) -> None:
        """Take no more generations, and wait until none is under way."""
        self._draining = True
        await self._idle.wait()

    async def handle(self, stream: Stream) -> None:
        """One generation. A client that goes away frees every stage."""
        try:
            async with timeout_awake(self._settings.timeouts.info_s):
                frame = await stream.receive()
            if frame is None:
                return
            message = pb.Delegate()
            try:
                message.ParseFromString(frame)
            except DecodeError:
                raise ProtocolError("no Delegate message") from None
            if self._draining:
                raise Busy("this peer is leaving and takes no new sessions of thin clients")
            limit = self._settings.limits.max_delegated
            if self.running >= limit:  # looked at only now: who opens streams and says nothing takes nobody's place
                raise Busy(f"limits.max_delegated: this peer owns {limit} sessions of thin clients already")
            self.running += 1
            self._idle.clear()
            try:
                await self._generate(stream, message)
            finally:
                self.running -= 1
                if not self.running:
                    self._idle.set()
        except TimeoutError:
            logger.info("%s delegated nothing", stream.remote[-6:])
        except SwarmError as error:
            logger.info("session for thin client %s: %s", stream.remote[-6:], error)
            with contextlib.suppress(SwarmError):  # it may be gone; then there is nobody to tell
                await _tell(stream, pb.DelegateReply(error=error_to_wire(error)))

    def _prefixes_of(self, client: PeerId) -> Prefixes:
        """With a key of its own: no client can find out by the time to its first token what another one asked."""
        prefixes = self._prefixes.setdefault(client, Prefixes(secrets.token_bytes(16)))
        self._prefixes.move_to_end(client)
        if len(self._prefixes) > MOST_CLIENTS:
            self._prefixes.popitem(last=False)
        return prefixes

    async def _generate(self, stream: Stream, message: pb.Delegate) -> None:
        request = request_from_wire(message, self._profile)
        prefixes = self._prefixes_of(stream.remote)
        session = Session(self._transport, self._view, self._profile, request, self._settings, self._health, prefixes)
        async with session, contextlib.aclosing(session.events()) as events:
            farewell = asyncio.ensure_future(stream.receive())
            beating = asyncio.ensure_future(self._beat(stream))
            forwarding = asyncio.ensure_future(self._forward(stream, events, len(request.prompt)))
            tasks = {farewell, beating, forwarding}
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if forwarding.done():
                    forwarding.result()
                    await _tell(stream, pb.DelegateReply(finished=session.finish_reason or "stop"))
                elif beating.done():
                    beating.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(
        self, stream: Stream, events: AsyncGenerator[RouteChanged | Generated, None], prompt_length: int
    ) -> None:
        async for event in events:
            if isinstance(event, RouteChanged):
                await _tell(stream, pb.DelegateReply(route=route_to_wire(event)))
                continue
            token = pb.Output(start=prompt_length + event.index - 1, token_ids=[event.token_id])
            token.hops.extend(timing_to_wire(timing) for timing in event.hops)
            if event.logprob is not None:
                ids, values = [i for i, _ in event.top_logprobs], [v for _, v in event.top_logprobs]
                token.logprobs.append(pb.Logprobs(logprob=event.logprob, top_ids=ids, top_logprobs=values))
            await _tell(stream, pb.DelegateReply(token=token))

    async def _beat(self, stream: Stream) -> None:
        heartbeat_s = self._settings.timeouts.heartbeat_s
        while True:
            await _tell(stream, pb.DelegateReply(heartbeat_s=heartbeat_s))
            await asyncio.sleep(heartbeat_s)


async def _tell(stream: Stream, reply: pb.DelegateReply) -> None:
    await stream.send(reply.SerializeToString())
