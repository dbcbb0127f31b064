"""A head kept as the checkpoint stores it gives, bit for bit, what the same matrix in float32 gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peers import compact_linear, linear
from peers.compact_linear import CompactLinear
from peers.linear import OneDnnLinear, packing_works
from peers.shard import Shard, Step
from peers.weights import Blocks, CompactRows, TensorSource, open_source
from swarm.models import config_dict, load_profile, resolve
from swarm.types import LayerRange
from tests.checkpoints import make_checkpoint, make_gguf


def matrix(rows: int, columns: int, kind: str) -> CompactRows:
    generator = torch.Generator().manual_seed(7)
    if kind == "Q8_0":
        codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
        scales = torch.rand(rows, columns // 32, generator=generator).half().float()
        return CompactRows(codes, scales)
    return CompactRows(torch.randn(rows, columns, generator=generator).to(getattr(torch, kind)))


def compact(part: CompactRows) -> CompactLinear:
    rows, columns = part.codes.shape
    linear = CompactLinear.read(rows, columns, part.slice)
    if linear is None:
        pytest.skip("no oneDNN, or a layout of its that is not known")
    return linear


@pytest.mark.parametrize("kind", ["Q8_0", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", [192, 1536, 1000])
def test_results_are_those_of_the_whole_matrix(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_linear, "SCRATCH_BYTES", 4 * 96 * 400)  # more than one block
    part = matrix(rows, 96, kind)
    linear, whole = compact(part), OneDnnLinear(part.expand(), None, packed=True)
    with torch.inference_mode():
        for shape in ((1, 1, 96), (1, 9, 96), (40, 96)):
            inputs = torch.randn(shape)
            assert torch.equal(linear(inputs), whole(inputs))
    assert linear.size_bytes < rows * 96 * 4


def test_what_is_not_compact_or_too_small_is_left_to_others() -> None:
    assert CompactLinear.read(1536, 96, lambda start, stop: None) is None
    assert CompactLinear.read(100, 96, matrix(100, 96, "Q8_0").slice) is None


def test_a_layout_that_is_not_known_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "PACKED_SIZES", (12,))
    assert CompactLinear.read(1536, 96, matrix(1536, 96, "Q8_0").slice) is None


class _Expanded:
    """A source that hides compact forms."""

    def __init__(self, source: TensorSource) -> None:
        self.names, self.shape, self.read, self.rows = source.names, source.shape, source.read, source.rows
        self.close = source.close

    def compact(self, name: str, start: int, stop: int) -> CompactRows | None:
        return None

    def blocks(self, name: str) -> Blocks | None:
        return None


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_do_not_depend_on_how_the_head_is_kept(kind: str, tied: bool, tmp_path: Path) -> None:
    if not packing_works(torch.float32):
        pytest.skip("no oneDNN here")
    if kind == "gguf":
        path = make_gguf(tmp_path / "m.gguf", tied=tied, quantisation="Q8_0")
    else:
        path = make_checkpoint(tmp_path / "m", tied=tied, dtype="bfloat16")
    reference = resolve(str(path), "float32")
    profile, config = load_profile(reference), config_dict(reference)
    layers = LayerRange(0, profile.num_layers)
    logits, sizes = [], []
    for source in (open_source(reference, layers), _Expanded(open_source(reference, layers))):
        shard = Shard.load(profile, config, source, layers)
        cache = shard.new_cache(layers, 8)
        (output,) = shard.run([Step(layers, cache, 0, token_ids=[3, 1, 4, 1, 5], head_rows=5)])
        logits.append(output.logits)
        sizes.append(shard.size_bytes)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    assert sizes[0] < sizes[1]
