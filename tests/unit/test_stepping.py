"""The inputs of a session in step mode: what is committed, what is awaited, what may stay when the route changes."""

from __future__ import annotations

import struct

import pytest

from swarm import protocol_pb2 as pb
from swarm.errors import BadRequest, BadTensor, ProtocolError, TooLong
from swarm.models import ModelProfile
from swarm.protocol import rows_to_wire
from swarm.stepping import Inputs
from swarm.types import ModelId

VOCAB = 5
PROFILE = ModelProfile(
    model_id=ModelId("toy@0"),
    name="toy",
    architecture="toy",
    num_layers=2,
    hidden_size=2,
    vocab_size=VOCAB,
    num_kv_heads=1,
    head_dim=1,
    max_positions=64,
    dtype="float32",
    end_ids=(),
    layer_bytes=1,
    embedding_bytes=1,
    head_bytes=1,
)


def row(value: float) -> bytes:
    return struct.pack(f"<{VOCAB}f", *[value] * VOCAB)


def output(step: int, start: int, *values: float) -> pb.Output:
    return pb.Output(step=step, start=start, tensor=rows_to_wire(b"".join(map(row, values)), "float32", VOCAB))


def answered(*tokens: int) -> Inputs:
    inputs = Inputs(10, PROFILE)
    inputs.feed(0, tokens, 0)
    inputs.commit(output(1, 0, *[0.0] * len(tokens)))
    assert inputs.answered
    return inputs


def test_rows_are_taken_once_in_order_and_only_for_the_newest_input() -> None:
    inputs = Inputs(10, PROFILE)
    inputs.feed(0, [1, 2, 3], 1)
    inputs.commit(output(1, 1, 1.0))
    inputs.commit(output(1, 1, 9.0))
    assert not inputs.answered
    inputs.commit(output(1, 1, 9.0, 2.0))
    assert inputs.answered
    assert inputs.answer().logits == row(1.0) + row(2.0)
    inputs.feed(2, [4], 2)
    inputs.commit(output(1, 2, 9.0))
    assert not inputs.answered, "that was the answer to what stood there before"
    inputs.commit(output(2, 2, 3.0))
    assert inputs.answer().logits == row(3.0)


@pytest.mark.parametrize(
    "bad",
    [
        output(1, 2, 1.0),
        output(1, 1, 1.0, 2.0, 3.0),
        pb.Output(step=1, start=1),
        pb.Output(step=1, start=1, tensor=rows_to_wire(row(1.0), "float32", VOCAB - 1)),
    ],
)
def test_what_can_not_be_an_answer_is_refused(bad: pb.Output) -> None:
    inputs = Inputs(10, PROFILE)
    inputs.feed(0, [1, 2, 3], 1)
    with pytest.raises((ProtocolError, BadTensor)):
        inputs.commit(bad)


def test_what_is_awaited_is_run_again_after_a_change_of_the_route() -> None:
    inputs = answered(1, 2, 3)
    assert inputs.kept == 3
    inputs.feed(3, [4, 0], 4)
    assert inputs.kept == 4


def test_tokens_that_some_stage_may_not_have_replaced_yet_are_not_kept() -> None:
    inputs = answered(1, 2, 3, 4)
    inputs.feed(2, [0, 0, 0, 0], 5)
    assert inputs.kept == 2, "a stage that this input has not reached holds the tokens before"
    inputs.feed(6, [1], 6)
    assert inputs.kept == 2, "the input before was never answered"
    inputs.commit(output(3, 6, 1.0))
    assert inputs.kept == 7, "the answer has passed all stages"
    assert inputs.unchanged == 2, "but not one that was off the route meanwhile"


def test_inputs_with_a_gap_outside_the_vocabulary_or_too_long_change_nothing() -> None:
    inputs = answered(1, 2, 3)
    for start, tokens, answer_from in ((4, [1], 4), (-1, [1], 0), (1, [1], 0), (1, [1], 2), (3, [], 3), (3, [5], 3)):
        with pytest.raises(BadRequest):
            inputs.feed(start, tokens, answer_from)
    with pytest.raises(TooLong):
        inputs.feed(3, [1] * 8, 3)
    assert inputs.tokens == [1, 2, 3]
    assert inputs.answered
