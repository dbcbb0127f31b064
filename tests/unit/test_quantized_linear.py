"""Matrices in blocks: what they hold, what they give, and that a shard with them is one model at every batch size."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from filelock import FileLock
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from peers import block_kernels as kernels_module
from peers import compiled as compiled_module
from peers import quantized_linear as linear_module
from peers.attention_kernel import attention_kernel
from peers.block_kernels import FLOAT32, PANEL, Matrix, Panels, block_kernels
from peers.linear import packing_works
from peers.loading import HEAD_KINDS, LAYER_KINDS
from peers.quantized_linear import MANY_ROWS, BlockLinear, PanelLinear, SideBySide, quantized_linear
from peers.shard import Shard, Step
from peers.weights import open_source
from peers.weights.blocks import BlockKind, Blocks, to_blocks
from swarm.errors import ConfigError
from swarm.models import config_dict, load_profile, resolve
from swarm.types import LayerRange
from tests.checkpoints import make_checkpoint, make_gguf

QUANTISED = (BlockKind.Q4_0, BlockKind.Q4_1, BlockKind.Q8_0)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", QUANTISED)
def test_blocks_hold_what_gguf_says_they_hold(kind: BlockKind) -> None:
    packed = quantize(random(7, 96).numpy(), GGMLQuantizationType[kind.name])
    blocks, wanted = to_blocks(random(7, 96), kind), dequantize(packed, GGMLQuantizationType[kind.name])
    assert blocks.data.nbytes == packed.nbytes
    assert (blocks.rows, blocks.columns) == wanted.shape == (7, 96)
    np.testing.assert_allclose(blocks.expand().numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "error"),
    [(BlockKind.Q4_0, 0.4), (BlockKind.Q4_1, 0.3), (BlockKind.Q8_0, 0.02), (BlockKind.BFLOAT16, 0.02)],
)
def test_quantising_costs_as_much_as_its_bits(kind: BlockKind, error: float) -> None:
    weights = random(16, 256)
    assert (to_blocks(weights, kind).expand() - weights).abs().max() < error


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", BlockKind)
@pytest.mark.parametrize("rows", [1, 3, 6, 7, 9, MANY_ROWS, 70])
def test_a_product_is_that_of_the_expanded_matrix(kind: BlockKind, rows: int, compiled: bool) -> None:
    if compiled and block_kernels() is None:
        pytest.skip("no C compiler here")
    matrix, bias, inputs = to_blocks(random(150, 160), kind), random(150), random(1, rows, 160, seed=1)
    linear = quantized_linear(matrix, bias) if compiled else BlockLinear(matrix, bias)
    wanted = torch.nn.functional.linear(inputs, matrix.expand(), bias)
    torch.testing.assert_close(linear(inputs), wanted, atol=5e-5, rtol=0)
    torch.testing.assert_close(linear(inputs.bfloat16()).float(), wanted, atol=0.3, rtol=0.02)


@pytest.mark.parametrize("outputs", [33, 64, 200])
@pytest.mark.parametrize("kind", BlockKind)
def test_rows_give_the_same_bits_alone_and_together(kind: BlockKind, outputs: int) -> None:
    if block_kernels() is None:
        pytest.skip("no C compiler here")
    linear, inputs = quantized_linear(to_blocks(random(outputs, 96), kind), None), random(40, 96, seed=1)
    together = linear(inputs)
    assert all(torch.equal(linear(inputs[:count]), together[:count]) for count in range(1, 40))
    torch.set_num_threads(3)
    assert torch.equal(linear(inputs), together)


@dataclass
class InFloats:
    """A float32 matrix as the kernels see it: ``packed`` outputs side by side."""

    matrix: torch.Tensor
    packed: int

    @property
    def described(self) -> Matrix:
        outputs, inputs = self.matrix.shape
        panels = self.matrix.view(outputs // self.packed, self.packed, inputs)
        self.data = panels.transpose(1, 2).contiguous()
        return FLOAT32, self.data.data_ptr(), outputs, inputs, self.packed


@pytest.mark.parametrize("packed", [8, 16, 32, 48, 64])
@pytest.mark.parametrize("inputs", [8, 96, 1000])
def test_so_do_rows_with_float32_panels_of_any_width(packed: int, inputs: int) -> None:
    kernels = block_kernels()
    if kernels is None or packed % kernels.lanes:
        pytest.skip("no C compiler here, or no such panels")
    matrix, rows = random(2 * packed, inputs), random(40, inputs, seed=1)

    def product(count: int) -> torch.Tensor:
        out = torch.empty(count, 2 * packed)
        kernels.product(rows[:count], cast("Panels", InFloats(matrix, packed)), 0, 2, out)
        return out

    together = product(40)
    torch.testing.assert_close(together, rows @ matrix.T, atol=1e-3, rtol=0)
    assert all(torch.equal(product(count), together[:count]) for count in range(1, 40))


@pytest.mark.parametrize("packed", [16, 32, 64])
@pytest.mark.parametrize("kind", QUANTISED)
def test_panels_are_rounded_into_the_order_of_the_machines_kernel(kind: BlockKind, packed: int) -> None:
    kernels = block_kernels()
    if kernels is None:
        pytest.skip("no C compiler here")
    matrix = to_blocks(random(200, 96), kind)
    rounded = torch.empty(3 * PANEL // packed, 96 // 2, packed, 2, dtype=torch.bfloat16)
    kernels.round_panels(Panels.of(matrix), 1, 4, packed, rounded.data_ptr())
    found = rounded.permute(0, 2, 1, 3).reshape(3 * PANEL, 96)[: 200 - PANEL]
    assert torch.equal(found, matrix.expand()[PANEL:].bfloat16())


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("outputs", [64, 150, 2000])
def test_many_rows_of_bfloat16_are_multiplied_by_the_machines_kernel(
    kind: BlockKind, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block_kernels() is None or not packing_works(torch.bfloat16):
        pytest.skip("no C compiler, or no kernel here")
    monkeypatch.setattr(linear_module, "bfloat16_is_fast", lambda: True)
    monkeypatch.setattr(linear_module, "SCRATCH_BYTES", 2**18)  # the largest takes several pieces
    monkeypatch.setattr(linear_module, "_scratch", lru_cache(linear_module._scratch.__wrapped__))
    matrix, rows = to_blocks(random(outputs, 160), kind), random(MANY_ROWS, 160, seed=1).bfloat16()
    linear = quantized_linear(matrix, None)
    assert isinstance(linear, PanelLinear)
    if linear_module._scratch(1, 160) is None:
        pytest.skip("its layout is not known")
    monkeypatch.setattr(PanelLinear, "_in_float32", None)
    wanted = rows.float() @ matrix.expand().bfloat16().float().T
    torch.testing.assert_close(linear(rows).float(), wanted, atol=0.05, rtol=0.01)


def test_matrices_of_several_kinds_stand_side_by_side() -> None:
    parts = [to_blocks(random(8, 64, seed=seed), kind) for seed, kind in enumerate(QUANTISED)]
    inputs = random(2, 64, seed=9)
    wanted = inputs @ torch.cat([part.expand() for part in parts]).T
    got = SideBySide([quantized_linear(part, None) for part in parts])(inputs)
    torch.testing.assert_close(got, wanted, atol=5e-5, rtol=0)


def test_a_machine_with_a_compiler_has_kernels() -> None:
    if not any(shutil.which(name) for name in compiled_module.COMPILERS):
        pytest.skip("no C compiler here")
    assert block_kernels() is not None
    assert attention_kernel() is not None


def test_a_machine_without_a_compiler_is_told_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled_module, "COMPILERS", ())
    monkeypatch.setenv("CC", "")
    assert block_kernels.__wrapped__() is None
    assert "no C compiler" in caplog.text


@pytest.mark.parametrize("place", ["under a file", "no home"])
def test_kernels_that_cannot_be_kept_are_compiled_all_the_same(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if block_kernels() is None:
        pytest.skip("no C compiler here")
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(compiled_module, "FLAGS", ("-O0", *compiled_module.FLAGS[1:]))  # takes a third of the time
    assert compiled_module.to_compile()
    assert block_kernels.__wrapped__() is not None
    assert "block_kernels.c is compiled again at each start, since it can't be kept: " in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_what_a_compiler_says_of_its_failure_is_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if block_kernels() is None:
        pytest.skip("no C compiler here")
    (tmp_path / "broken.c").write_text("int product( {")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels_module, "SOURCE", tmp_path / "broken.c")
    assert block_kernels.__wrapped__() is None
    assert "the compiler failed" in caplog.text
    assert "broken.c" in caplog.text


@pytest.mark.parametrize("hangs", [False, True])
def test_peers_that_start_together_compile_once(
    hangs: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless one hangs that has begun: its library is not waited for for ever."""
    found, compiler, source = tmp_path / "found", tmp_path / "cc", tmp_path / "some.c"
    compiler.write_text(f'#!/bin/sh\necho >> "{found}"\nsleep 0.2\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    compiler.chmod(0o755)
    source.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(compiler))
    if hangs:
        monkeypatch.setattr(compiled_module, "TURN_S", 0.1)
        (tmp_path / "swarm" / "kernels").mkdir(parents=True)

    def made(_: int) -> bool:
        with compiled_module._compiled(source) as place:
            return place.is_file()

    holder = FileLock(tmp_path / "swarm" / "kernels" / "lock") if hangs else nullcontext()
    with holder, ThreadPoolExecutor(3) as pool:
        assert all(pool.map(made, range(3)))
    assert len(found.read_text().splitlines()) == (3 if hangs else 1)
    assert ("not waited for" in caplog.text) == hangs


# ---- shards -----------------------------------------------------------------------------------------------------

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def shard_of(path: Path, weights: str, layers: LayerRange | None = None, dtype: str = "float32") -> Shard:
    reference = resolve(str(path), dtype, weights=weights)
    profile = load_profile(reference)
    layers = layers or LayerRange(0, profile.num_layers)
    kind = getattr(torch, dtype)
    return Shard.load(profile, config_dict(reference), open_source(reference, layers), layers, dtype=kind)


def logits_of(shards: list[Shard], chunks: list[int]) -> torch.Tensor:
    """Of all of ``TEXT``, run in chunks of these sizes through shards that follow each other."""
    caches = [shard.new_cache(shard.layers, len(TEXT)) for shard in shards]
    found, start = [], 0
    for count in chunks:
        hidden, logits = None, None
        for shard, cache in zip(shards, caches, strict=True):
            step = Step(shard.layers, cache, start, hidden=hidden)
            if shard is shards[0]:
                step.token_ids = TEXT[start : start + count]
            if shard is shards[-1]:
                step.head_rows = count
            (output,) = shard.run([step])
            assert output.error is None
            hidden, logits = output.hidden, output.logits
        assert logits is not None
        found.append(logits)
        start += count
    return torch.cat(found)


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_three_peers_in_steps_give_what_one_gives_at_once(weights: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m")
    whole = shard_of(path, weights)
    last = whole.profile.num_layers
    parts = [
        shard_of(path, weights, LayerRange(*pair))
        for pair in ((0, 1), (1, last - 1), (last - 1, last))
        if pair[0] < pair[1]
    ]
    at_once = logits_of([whole], [len(TEXT)])
    torch.testing.assert_close(logits_of(parts, [5, 1, 1, 3, 2]), at_once, atol=1e-5, rtol=0)
    plain = logits_of([shard_of(path, "auto")], [len(TEXT)])
    assert not torch.allclose(at_once, plain, atol=1e-6), "the weights were not quantised at all"
    assert (at_once - plain).abs().max() < 0.5 * plain.abs().max()


@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_files_own_blocks_are_kept_as_they_are(quantisation: str, tied: bool, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", tied=tied, quantisation=quantisation)
    weights = "int8" if quantisation == "Q8_0" else "int4"
    small, plain = shard_of(path, weights), shard_of(path, "auto")
    torch.testing.assert_close(logits_of([small], [len(TEXT)]), logits_of([plain], [len(TEXT)]), atol=2e-5, rtol=0)
    assert small.size_bytes < 0.5 * plain.size_bytes
    modules = [module for module in small._model.modules() if isinstance(module, PanelLinear | BlockLinear)]
    assert {module.matrix.kind.name for module in modules} == {quantisation}


def test_every_choice_is_a_model_of_its_own(tmp_path: Path) -> None:
    path = str(make_checkpoint(tmp_path / "m"))
    profiles = [load_profile(resolve(path, weights=weights)) for weights in ("auto", "bfloat16", "int8", "int4")]
    assert len({profile.model_id for profile in profiles}) == 4
    assert load_profile(resolve(path, weights="float32")) == profiles[0]
    sizes = [profile.layer_bytes for profile in profiles]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    path = str(make_checkpoint(tmp_path / "m"))
    with pytest.raises(ConfigError, match="take bfloat16 or a smaller kind"):
        resolve(path, "bfloat16", weights="float32")
    with pytest.raises(ConfigError, match="auto, float32, bfloat16, int8, int4"):
        resolve(path, weights="int3")


def test_the_sizes_that_are_reckoned_with_are_those_that_blocks_have(tmp_path: Path) -> None:
    for weights, kind in LAYER_KINDS.items():
        profile = load_profile(resolve(str(make_checkpoint(tmp_path / weights)), weights=weights))
        shard = shard_of(tmp_path / weights, weights)
        head = (
            profile.hidden_size * 4 + profile.vocab_size * profile.hidden_size // 32 * HEAD_KINDS[weights].block_bytes
        )
        assert profile.head_bytes == head, kind
        assert shard.size_bytes <= profile.num_layers * profile.layer_bytes + profile.head_bytes
        assert isinstance(Blocks(kind, torch.zeros(1, kind.block_bytes, dtype=torch.uint8)).columns, int)
