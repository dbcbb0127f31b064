"""Step mode at the last stage: the logits, and the hidden states if wanted, that are on their way to the owner."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from peers.executor import StepReply
from peers.stage_input import StepMark
from swarm import protocol_pb2 as pb
from swarm.errors import ProtocolError
from swarm.models import ModelProfile
from swarm.protocol import rows_to_wire
from swarm.wire import row_bytes


def step_to_wire(step: StepMark) -> pb.Step:
    return pb.Step(number=step.number, answer_from=step.answer_from, hidden=step.hidden)


def step_from_wire(step: pb.Step) -> StepMark:
    return StepMark(step.number, step.answer_from, step.hidden)


@dataclass(frozen=True, slots=True)
class _Answer:
    step: int
    start: int
    logits: bytes
    hidden: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.logits) + len(self.hidden)


class StepAnswers:
    """Bounded: an owner waits for one step's answers before it asks for the next."""

    def __init__(self, profile: ModelProfile, max_bytes: int) -> None:
        self._profile = profile
        self._max_bytes = max_bytes
        self._waiting: deque[_Answer] = deque()
        self._under_way_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Of those that the owner has not taken."""
        return self._under_way_bytes + self._waiting_bytes

    @property
    def _waiting_bytes(self) -> int:
        return sum(answer.size_bytes for answer in self._waiting)

    def clear(self) -> None:
        self._waiting.clear()

    def add(self, step: StepMark, end: int, rows: int, reply: StepReply) -> None:
        """The last ``rows`` rows before position ``end``; answers to earlier steps are forgotten.

        Raises :class:`ProtocolError` if the owner wants more at once than it takes.
        """
        while self._waiting and self._waiting[0].step != step.number:
            self._waiting.popleft()
        width = row_bytes(self._profile.dtype, self._profile.hidden_size)
        hidden = reply.hidden[-rows * width :] if step.hidden else b""
        answer = _Answer(step.number, end - rows, reply.logits, hidden)
        size = answer.size_bytes + self._waiting_bytes
        if size > self._max_bytes and (rows > 1 or self._waiting):
            raise ProtocolError(f"{size} bytes of logits wait for the owner; the limit is {self._max_bytes}")
        self._waiting.append(answer)

    def take(self, epoch: int) -> pb.Output | None:
        """The next message for the owner, who has taken the one before."""
        if not self._waiting:
            self._under_way_bytes = 0
            return None
        answer, profile = self._waiting.popleft(), self._profile
        self._under_way_bytes = answer.size_bytes
        output = pb.Output(epoch=epoch, start=answer.start, step=answer.step)
        output.tensor.CopyFrom(rows_to_wire(answer.logits, "float32", profile.vocab_size))
        if answer.hidden:
            output.hidden.CopyFrom(rows_to_wire(answer.hidden, profile.dtype, profile.hidden_size))
        return output
