"""Answers to anyone's questions: what this peer serves, its model's small files, an echo."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from peers.dial_back import DialBack
from peers.probe import Prober
from swarm import protocol_pb2 as pb
from swarm.awake import timeout_awake
from swarm.config import TimeoutSettings
from swarm.errors import BadRequest, SwarmError
from swarm.info import file_s
from swarm.protocol import decode, error_to_wire
from swarm.transport import Stream

logger = logging.getLogger(__name__)

FILE_CHUNK_BYTES = 256 * 1024


class Answers:
    """``handle`` runs once for each question."""

    def __init__(
        self,
        describe: Callable[[], pb.Description],
        plan: Callable[[pb.PlanRequest], pb.RouteNews],
        files: Mapping[str, bytes],
        prober: Prober | None,
        dial_back: DialBack | None,
        timeouts: TimeoutSettings,
    ) -> None:
        self._describe = describe
        self._plan = plan
        self._files = files
        self._prober = prober
        self._dial_back = dial_back
        self._timeouts = timeouts

    async def handle(self, stream: Stream) -> None:
        try:
            async with timeout_awake(max(self._timeouts.info_s, self._timeouts.probe_s)) as deadline:
                frame = await stream.receive()
                if frame is None:
                    return
                request = decode(pb.InfoRequest, frame)
                kind = request.WhichOneof("kind")
                if kind == "describe":
                    await stream.send(pb.InfoReply(description=self._describe()).SerializeToString())
                elif kind == "echo":
                    await stream.send(pb.InfoReply(echo=request.echo).SerializeToString())
                elif kind == "plan":
                    await self._send_plan(stream, request.plan)
                elif kind in ("probe", "probe_me"):
                    await self._send_probed(stream, request)
                elif kind == "dial_me":
                    await self._send_dialled(stream, request.dial_me)
                else:
                    size = len(self._files.get(request.model_file, b""))
                    deadline.reschedule(asyncio.get_running_loop().time() + file_s(size, self._timeouts))
                    await self._send_file(stream, request.model_file)
        except TimeoutError:
            logger.info("%s asked nothing, or read too slowly", stream.remote[-6:])
        except SwarmError as error:
            logger.info("question of %s: %s", stream.remote[-6:], error)

    async def _send_plan(self, stream: Stream, request: pb.PlanRequest) -> None:
        try:
            reply = pb.InfoReply(plan=self._plan(request))
        except SwarmError as error:
            reply = pb.InfoReply(error=error_to_wire(error))
        await stream.send(reply.SerializeToString())

    async def _send_probed(self, stream: Stream, request: pb.InfoRequest) -> None:
        try:
            if self._prober is None:
                raise BadRequest("this peer takes no part in probes")
            if request.WhichOneof("kind") == "probe":
                reply = pb.InfoReply(probed=await self._prober.answer(request.probe))
            else:
                reply = pb.InfoReply(voucher=await self._prober.vouch(stream.remote, request.probe_me))
        except SwarmError as error:
            reply = pb.InfoReply(error=error_to_wire(error))
        await stream.send(reply.SerializeToString())

    async def _send_dialled(self, stream: Stream, request: pb.DialMe) -> None:
        try:
            if self._dial_back is None:
                raise BadRequest("this peer dials nobody back")
            reply = pb.InfoReply(dialled_back=await self._dial_back.answer(stream, request))
        except SwarmError as error:
            reply = pb.InfoReply(error=error_to_wire(error))
        await stream.send(reply.SerializeToString())

    async def _send_file(self, stream: Stream, name: str) -> None:
        data = self._files.get(name)
        if data is None:
            error = BadRequest(f"this peer has no file {name[:80]!r}")
            await stream.send(pb.InfoReply(error=error_to_wire(error)).SerializeToString())
            return
        for offset in range(0, max(1, len(data)), FILE_CHUNK_BYTES):
            chunk = data[offset : offset + FILE_CHUNK_BYTES]
            await stream.send(pb.InfoReply(chunk=chunk).SerializeToString())
