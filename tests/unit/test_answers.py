"""What a peer answers to anyone, over lines that are slow."""

from __future__ import annotations

import asyncio
import random

import pytest

from peers.answers import FILE_CHUNK_BYTES, Answers
from swarm import protocol_pb2 as pb
from swarm.config import Settings, TimeoutSettings
from swarm.errors import ProtocolError
from swarm.info import Description, describe, fetch_files
from swarm.protocol import decode
from swarm.testing import Faults, SimNetwork, SimTransport, run_virtual
from swarm.transport import INFO
from swarm.types import LayerRange, PeerId
from tests.sim.world import PROFILE

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


def test_a_large_model_file_comes_over_a_line_of_1_mbit_a_second() -> None:
    data = bytes(12_000_000)  # a tokenizer of today

    async def main() -> None:
        network = SimNetwork(random.Random(1), Faults())
        asker, asked = network.add("asker"), network.add("asked")
        network.bytes_per_s[PeerId("asked"), PeerId("asker")] = 125e3
        answers = Answers(
            pb.Description, lambda request: pb.RouteNews(), {"large": data}, None, None, TimeoutSettings()
        )
        await SimTransport(asked).serve(INFO, answers.handle)
        told = Description(asked.address, PROFILE, LayerRange(0, 6), "serving", "0", {"large": len(data)}, 0, 0, 0)
        assert await fetch_files(SimTransport(asker), told, ["large"], Settings()) == {"large": data}

    run_virtual(main)


@pytest.mark.parametrize(("frame_s", "all_of_it"), [(1.0, True), (3.0, True), (9.0, False)])
def test_a_model_file_takes_as_long_as_who_asks_waits_for_it(frame_s: float, all_of_it: bool) -> None:
    data = bytes(CHUNKS * FILE_CHUNK_BYTES)
    line = Line(pb.InfoRequest(model_file="tokenizer.json"), frame_s)
    files = {"tokenizer.json": data}
    answers = Answers(pb.Description, lambda request: pb.RouteNews(), files, None, None, TimeoutSettings())
    run_virtual(lambda: answers.handle(line))
    assert (b"".join(line.taken) == data) is all_of_it


@pytest.mark.parametrize("wrong", [{"profile_json": "{}"}, {"start": 3, "end": 3}])
def test_a_description_that_makes_no_sense_is_what_no_honest_peer_sends(wrong: dict[str, str | int]) -> None:
    facts = {"model": PROFILE.model_id, "profile_json": PROFILE.to_json(), "start": 0, "end": 6}

    async def main(told: pb.Description) -> None:
        network = SimNetwork(random.Random(1), Faults())
        asker, asked = network.add("asker"), network.add("asked")
        answers = Answers(lambda: told, lambda request: pb.RouteNews(), {}, None, None, TimeoutSettings())
        await SimTransport(asked).serve(INFO, answers.handle)
        await describe(SimTransport(asker), asked.address, Settings())

    run_virtual(lambda: main(pb.Description(**facts)))
    with pytest.raises(ProtocolError, match="makes no sense"):
        run_virtual(lambda: main(pb.Description(**facts | wrong)))
