"""Hidden states in the encodings of the wire: what they lose, what they refuse, and where a session uses them."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from peers.engine import Engine
from peers.executor import StepRequest, run
from peers.row_codec import decoded, encoded
from peers.shard import Shard
from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.delegation import route_from_wire
from swarm.errors import BadRequest, BadTensor
from swarm.protocol import (
    MAX_HOPS,
    MAX_MESSAGE_CHARS,
    MAX_TIMING_BYTES,
    error_from_wire,
    rows_from_wire,
    rows_to_wire,
    timing_to_wire,
    timings_from_wire,
)
from swarm.sampling import SamplingParams
from swarm.transcript import GenerationRequest, Transcript
from swarm.types import HopTiming, LayerRange, PeerId
from swarm.wire import AS_IT_IS, BLOCK, WIRES, Wire, encoding_of, row_bytes
from tests.reference import ModelSource, profile_of
from tests.unit.test_stage_drafts import opened, stage

LAYERS = LayerRange(0, 6)


def rows_of(seed: int, count: int, width: int, scale: float) -> torch.Tensor:
    rows = scale * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    rows[0, :BLOCK] = 0.0
    rows[-1, width // 2] *= 1000  # as real hidden states have them
    return rows


shapes = st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 100), st.sampled_from([1e-20, 1e-3, 1.0, 1e30]))


@given(shapes)
def test_int8_is_right_to_half_a_step_of_each_block(shape: tuple[int, int, int, float]) -> None:
    rows = rows_of(*shape)
    found = decoded(encoded(rows, "int8"), "int8", rows.shape[1], torch.float32)
    for start in range(0, rows.shape[1], BLOCK):
        block = rows[:, start : start + BLOCK]
        steps = block.abs().amax(1, keepdim=True) / 127
        assert bool(((found[:, start : start + BLOCK] - block).abs() <= 0.51 * steps).all())


@given(shapes, st.sampled_from(["float32", "bfloat16", "float16", "int8"]))
def test_a_rows_bytes_depend_on_this_row_alone_and_are_kept_by_another_round(
    shape: tuple[int, int, int, float], encoding: str
) -> None:
    rows = rows_of(*shape)
    if encoding == "float16":
        rows = rows.clamp(-6e4, 6e4)
    width = rows.shape[1]
    data = encoded(rows, encoding)
    assert len(data) == rows.shape[0] * row_bytes(encoding, width)
    assert data == b"".join(encoded(row[None], encoding) for row in rows)
    again = decoded(data, encoding, width, torch.float32)
    assert encoded(again, encoding) == data
    assert torch.equal(again, decoded(data, encoding, width, torch.float32))


def test_the_models_own_dtype_is_exact() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows = rows_of(1, 4, 48, 1.0).to(dtype)
        name = str(dtype).removeprefix("torch.")
        assert torch.equal(decoded(encoded(rows, name), name, 48, dtype), rows)


def test_sizes() -> None:
    assert [row_bytes(encoding, 576) for encoding in ("float32", "bfloat16", "int8")] == [2304, 1152, 576 + 36]
    assert row_bytes("int8", 33) == 33 + 4
    assert [encoding_of(wire, "float16") for wire in WIRES] == ["float16", "bfloat16", "int8"]


def test_what_can_be_no_rows_is_refused_before_a_tensor_is_built() -> None:
    good = rows_to_wire(encoded(rows_of(2, 3, 40, 1.0), "int8"), "int8", 40)
    assert rows_from_wire(good, "int8", 40, 8) == good.data
    hostile = [
        pb.Tensor(dtype="int8", shape=[3, 40], data=good.data[:-1]),
        pb.Tensor(dtype="int8", shape=[3, 40], data=good.data + b"\0"),
        pb.Tensor(dtype="int8", shape=[4, 40], data=good.data),
        pb.Tensor(dtype="int8", shape=[9, 40], data=bytes(9 * row_bytes("int8", 40))),
        pb.Tensor(dtype="int8", shape=[3, 32], data=good.data),
        pb.Tensor(dtype="int8", shape=[2**32 - 1, 40], data=good.data),
        pb.Tensor(dtype="float32", shape=[3, 40], data=bytes(3 * 160)),
        pb.Tensor(dtype="int4", shape=[3, 40], data=good.data),
    ]
    for tensor in hostile:
        with pytest.raises(BadTensor):
            rows_from_wire(tensor, "int8", 40, 8)


@pytest.fixture(scope="module")
def shard() -> Shard:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    return Shard.load(
        profile_of(config), config.to_dict(), ModelSource(LlamaForCausalLM(config).eval()), LayerRange(0, 3)
    )


@pytest.mark.parametrize("wire", WIRES)
async def test_a_stage_takes_and_gives_rows_in_its_wire(shard: Shard, wire: str) -> None:
    first, middle = LayerRange(0, 1), LayerRange(1, 2)
    encoding = encoding_of(wire, "float32")
    async with Engine(shard, Settings()) as engine:
        start = StepRequest(first, engine.new_cache(first, 9), 0, 5, [3, 1, 4, 1, 5], None)
        exact = decoded((await run(engine, start)).hidden, "float32", 40, torch.float32)
        sent = (await run(engine, replace(start, output_wire=wire))).hidden
        assert sent == encoded(exact, encoding)
        going_on = StepRequest(middle, engine.new_cache(middle, 9), 0, 5, None, sent, input_wire=wire)
        rounded = encoded(decoded(sent, encoding, 40, torch.float32), "float32")
        exactly = replace(going_on, cache=engine.new_cache(middle, 9), hidden=rounded, input_wire="model")
        assert (await run(engine, going_on)).hidden == (await run(engine, exactly)).hidden


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
async def test_a_scale_that_is_no_number_is_refused_and_hurts_nothing(shard: Shard, scale: float) -> None:
    middle = LayerRange(1, 2)
    good = encoded(rows_of(3, 2, 40, 1.0), "int8")
    bad = struct.pack("<f", scale)[2:] + good[2:]  # the upper half is a bfloat16
    async with Engine(shard, Settings()) as engine:
        request = StepRequest(middle, engine.new_cache(middle, 4), 0, 2, None, bad, input_wire="int8")
        with pytest.raises(BadTensor, match="not finite"):
            await run(engine, request)
        assert (await run(engine, replace(request, hidden=good))).hidden


@pytest.mark.parametrize("kind", ["model", "int8"])
async def test_rows_that_are_not_finite_leave_nothing_behind(shard: Shard, kind: str) -> None:
    middle = LayerRange(1, 2)
    good = encoded(rows_of(4, 3, 40, 1.0), "float32")
    bad = good[:160] + struct.pack("<f", float("nan")) * 80
    async with Engine(shard, Settings()) as engine:

        async def last_row_after(*broken: bytes) -> bytes:
            cache = engine.new_cache(middle, 9, kind)
            await run(engine, StepRequest(middle, cache, 0, 1, None, good[:160]))
            for rows in broken:
                with pytest.raises(BadTensor, match="not finite"):
                    await run(engine, StepRequest(middle, cache, 1, 3, None, rows))
            return (await run(engine, StepRequest(middle, cache, 1, 1, None, good[160:320]))).hidden

        assert await last_row_after(bad) == await last_row_after(), "they are still in the cache's memory"


def test_a_hop_that_says_nonsense_of_its_time_ends_no_session() -> None:
    sane = timing_to_wire(HopTiming(PeerId("peer"), LayerRange(0, 3), 0.001, 0.002, 4, 0.5))
    (told,) = timings_from_wire([sane])
    assert (told.peer_id, told.layers, told.batch, told.link_s) == ("peer", LayerRange(0, 3), 4, 0.5)
    backwards = pb.HopTiming(peer_id="peer", start=3, end=1).SerializeToString()
    for nonsense in (b"\xff\xff", backwards):
        assert timings_from_wire([sane, nonsense]) == ()


def test_what_a_hop_says_of_times_and_reasons_is_cut() -> None:
    """A frame full of timings stopped its client for seconds and stayed in its memory."""
    timing = pb.HopTiming(peer_id="peer", end=1).SerializeToString()
    wordy = pb.HopTiming(peer_id="peer" * MAX_TIMING_BYTES, end=1).SerializeToString()
    transcript = Transcript(GenerationRequest((1,), 5, SamplingParams(), frozenset()), 6, 64)
    transcript.commit(pb.Output(token_ids=[3], hops=[wordy] + [timing] * 10 * MAX_HOPS))
    assert len(transcript.fresh[0].hops) == MAX_HOPS - 1
    said = pb.Error(code="x" * 10**6, message="y" * 10**6)
    assert len(error_from_wire(said).message) < 2 * MAX_MESSAGE_CHARS
    hop = pb.RouteHop(peer=pb.Address(peer_id="peer"), end=6)
    rebuilt = pb.Rebuilt(lost=[hop] * 10 * MAX_HOPS, replayed=[pb.Replayed(end=6)] * 10 * MAX_HOPS)
    changed = route_from_wire(pb.RouteNews(hops=[hop], reason="y" * 10**6, rebuilt=rebuilt))
    assert len(changed.reason) == MAX_MESSAGE_CHARS
    assert changed.rebuild is not None
    assert len(changed.rebuild.lost) == len(changed.rebuild.replayed) == MAX_HOPS


def test_what_a_peer_says_in_words_is_one_line_without_commands_to_a_terminal() -> None:
    said = "gone\x1b]0;a title\x07\n\x1b[2Jswarm: all is well"
    told = error_from_wire(pb.Error(code="new\x1b", message=said)).message
    news = pb.RouteNews(hops=[pb.RouteHop(peer=pb.Address(peer_id="peer"), end=6)], reason=said)
    assert route_from_wire(news).reason == "gone ]0;a title   [2Jswarm: all is well"
    assert told == f"new : {route_from_wire(news).reason}"


def test_a_session_rounds_where_its_first_route_was_cut() -> None:
    wire = Wire("int8").cut_at([0, 2, 4])
    assert wire.cut_at([0, 3]) is wire, "the first route counts"
    assert [wire.into(layer) for layer in (0, 2, 3, 4, 6)] == ["model", "int8", "model", "int8", "model"]
    assert [str(piece) for piece in wire.pieces(LAYERS)] == ["0:2", "2:4", "4:6"]
    assert [str(piece) for piece in wire.pieces(LayerRange(1, 4))] == ["1:2", "2:4"]
    assert AS_IT_IS.cut_at([0, 2]).pieces(LAYERS) == [LAYERS]
    assert Wire("int8").cut_at([0]).pieces(LAYERS) == [LAYERS]
    assert len({w.suffix for w in (wire, Wire("int8"), Wire("int8", (0, 3)), Wire("bfloat16", (0, 2, 4)))}) == 4
    assert AS_IT_IS.suffix == ""
    assert Wire.chosen("bfloat16", "bfloat16") == AS_IT_IS


@pytest.mark.parametrize(("name", "cuts"), [("int3", ()), ("", ()), ("int8", (2, 4)), ("int8", (0, 4, 4))])
def test_a_wire_that_there_is_not_is_refused(name: str, cuts: tuple[int, ...]) -> None:
    with pytest.raises(BadRequest):
        Wire(name, cuts)


def test_a_stage_refuses_a_wire_that_it_does_not_know() -> None:
    with pytest.raises(BadRequest, match="no such wire as 'morse'"):
        opened(output_wire="morse")
    made = stage(last=False, output_wire="int8")
    with pytest.raises(BadRequest, match="come and go as when it was opened"):
        made.reopen(opened(epoch=2))
    made.reopen(opened(epoch=2, output_wire="int8"))
