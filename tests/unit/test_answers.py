"""What a peer answers to anyone, over lines that are slow."""

from __future__ import annotations

import asyncio

import pytest

from peers.answers import FILE_CHUNK_BYTES, Answers
from swarm import protocol_pb2 as pb
from swarm.config import TimeoutSettings
from swarm.protocol import decode
from swarm.testing import run_virtual
from swarm.types import PeerId

CHUNKS = 30


class Line:
    """A stream that takes a frame in ``frame_s``."""

    remote, remote_address = PeerId("asker"), ""

    def __init__(self, question: pb.InfoRequest, frame_s: float) -> None:
        self._question, self._frame_s = question, frame_s
        self.taken: list[bytes] = []

    async def receive(self) -> bytes | None:
        return self._question.SerializeToString()

    async def send(self, frame: bytes) -> None:
        await asyncio.sleep(self._frame_s)
        self.taken.append(decode(pb.InfoReply, frame).chunk)

    def try_send(self, frame: bytes) -> bool:
        raise NotImplementedError

    async def close(self) -> None: ...

    def abort(self) -> None: ...


@pytest.mark.parametrize(("frame_s", "all_of_it"), [(1.0, True), (9.0, False)])
def test_a_model_file_takes_as_long_as_who_asks_waits_for_it(frame_s: float, all_of_it: bool) -> None:
    data = bytes(CHUNKS * FILE_CHUNK_BYTES)
    line = Line(pb.InfoRequest(model_file="tokenizer.json"), frame_s)
    files = {"tokenizer.json": data}
    answers = Answers(pb.Description, lambda request: pb.RouteNews(), files, None, None, TimeoutSettings())
    run_virtual(lambda: answers.handle(line))
    assert (b"".join(line.taken) == data) is all_of_it
