"""GGUF weights: equal to what transformers makes of the same file, read by range, nothing else in memory."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peers.weights import open_source
from swarm import gguf_file
from swarm.errors import ModelError, UnsupportedModel, WrongRange
from swarm.models import ModelReference, load_profile, resolve
from swarm.types import LayerRange
from tests.checkpoints import make_gguf
from tests.reference import load_gguf


def their_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The parameters as transformers' own GGUF loader has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors: dict[str, torch.Tensor] = load_gguf(path)["tensors"]
    return tensors


@pytest.fixture(scope="module")
def built_in() -> ModelReference:
    return resolve("smollm2-135m")


def test_the_built_in_equals_transformers_tensor_for_tensor(built_in: ModelReference) -> None:
    wanted = their_tensors(built_in.path)
    source = open_source(built_in, LayerRange(0, 30))
    assert set(source.names()) == set(wanted)
    for name in source.names():
        read = source.read(name, torch.float32, "cpu")
        assert torch.equal(read, wanted[name]), name
        assert source.shape(name) == tuple(read.shape)
    source.close()


@pytest.mark.parametrize("quantisation", ["F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0"])
def test_every_kind_of_quantisation_equals_transformers(quantisation: str, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", quantisation=quantisation)
    wanted = their_tensors(path)
    source = open_source(resolve(str(path)), LayerRange(0, 2))
    for name in source.names():
        assert torch.equal(source.read(name, torch.float32), wanted[name].float()), name
        assert torch.equal(source.read(name, torch.bfloat16), wanted[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_reads_back_what_was_written(family: str, tied: bool, tmp_path: Path) -> None:
    from swarm.architectures import Architecture
    from tests.checkpoints import make_config, random_tensors

    path = make_gguf(tmp_path / "m.gguf", family, tied=tied, quantisation="F32")
    config = make_config(family, tied=tied, layers=2, hidden=64, vocab=384, dtype="float32")
    shapes = Architecture.from_config(config, "").shapes(0, 2)
    source = open_source(resolve(str(path)), LayerRange(0, 2))
    written = dict(random_tensors(shapes, shapes, torch.float32, 0))
    assert set(source.names()) == set(written)
    for name, tensor in written.items():
        assert torch.equal(source.read(name, torch.float32), tensor), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_families_without_permutation_equal_transformers(family: str, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", family)
    wanted = their_tensors(path)
    source = open_source(resolve(str(path)), LayerRange(0, 2))
    for name in source.names():
        assert torch.equal(source.read(name, torch.float32), wanted[name]), name


def test_a_range_has_its_own_tensors_only(built_in: ModelReference) -> None:
    def names(start: int, end: int) -> set[str]:
        return {name for name in open_source(built_in, LayerRange(start, end)).names() if ".layers." not in name}

    assert names(10, 20) == set()
    assert names(0, 10) == {"model.embed_tokens.weight"}
    assert names(20, 30) == {"model.embed_tokens.weight", "model.norm.weight"}  # tied: the head is the embedding
    source = open_source(built_in, LayerRange(3, 4))
    assert len(source.names()) == 9
    with pytest.raises(ModelError, match="not among the tensors of this range"):
        source.read("model.layers.4.mlp.up_proj.weight", torch.float32)
    with pytest.raises(WrongRange, match="0:30; 20:31 is outside"):
        open_source(built_in, LayerRange(20, 31))


def test_rows_of_the_embedding_come_straight_from_the_file(built_in: ModelReference) -> None:
    source = open_source(built_in, LayerRange(0, 1))
    table = source.read("model.embed_tokens.weight", torch.float32)
    ids = [0, 49151, 7, 7, 1234]
    assert torch.equal(source.rows("model.embed_tokens.weight", ids, torch.float32), table[ids])
    rows = source.rows("model.embed_tokens.weight", ids, torch.bfloat16)
    assert torch.equal(rows, table[ids].to(torch.bfloat16))
    assert source.rows("model.embed_tokens.weight", [], torch.float32).shape == (0, 576)
    with pytest.raises(ModelError, match="rows 0 to 49151"):
        source.rows("model.embed_tokens.weight", [49152], torch.float32)


def test_a_truncated_file_is_found_before_anything_is_read(built_in: ModelReference, tmp_path: Path) -> None:
    raw = make_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw[:-2000])
    with pytest.raises(ModelError, match="cut off"):
        open_source(resolve(str(path)), LayerRange(0, 2))


def test_missing_misshapen_and_unreadable_tensors_are_named(tmp_path: Path) -> None:
    raw = make_gguf(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "odd.gguf"
    reference = ModelReference("gguf", "odd", "float32", path)

    path.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_upp.weigh"))
    with pytest.raises(ModelError, match=r"lacks the tensor blk\.1\.ffn_up\.weight"):
        open_source(reference, LayerRange(0, 2))
    with pytest.raises(UnsupportedModel, match=r"has the tensor blk\.1\.ffn_upp\.weigh,"):
        open_source(reference, LayerRange(0, 1))  # this layer is whole, but what is the other one?

    place = raw.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight")
    shape = (32).to_bytes(8, "little") + (128).to_bytes(8, "little")
    path.write_bytes(raw[: place + 4] + shape + raw[place + 20 :])
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight has the shape"):
        open_source(reference, LayerRange(0, 2))

    path.write_bytes(raw[: place + 20] + (99).to_bytes(4, "little") + raw[place + 24 :])
    with pytest.raises(UnsupportedModel, match="unknown ggml type 99"):
        open_source(reference, LayerRange(0, 2))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_biases_in_the_file_are_the_models(family: str, tmp_path: Path) -> None:
    sizes = {"attn_q": 64, "attn_k": 32, "attn_v": 32, "attn_output": 64}
    names = {f"self_attn.{name}_proj.bias": part for name, part in zip("qkvo", sizes, strict=True)}
    if family == "llama":
        sizes |= {"ffn_gate": 128, "ffn_up": 128, "ffn_down": 64}
        names |= {f"mlp.{name}_proj.bias": f"ffn_{name}" for name in ("gate", "up", "down")}
    biases = {
        f"blk.{layer}.{part}.bias": np.arange(size, dtype=np.float32)
        for layer in range(2)
        for part, size in sizes.items()
    }
    source = open_source(resolve(str(make_gguf(tmp_path / "m.gguf", family, extra_tensors=biases))), LayerRange(0, 2))
    for name, part in names.items():
        found = source.read(f"model.layers.1.{name}", torch.float32)
        assert sorted(found.tolist()) == list(range(sizes[part])), name


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("llama", "blk.0.attn_q_norm.weight"),
        ("llama", "blk.1.ffn_up.scale"),
        ("mistral", "blk.0.attn_q.bias"),
        ("qwen2", "blk.0.attn_output.bias"),
        ("qwen2", "output.bias"),
    ],
)
def test_tensors_that_no_layer_would_use_are_refused(family: str, tensor: str, tmp_path: Path) -> None:
    """Without them the model would be another one, and say something else."""
    path = make_gguf(tmp_path / "m.gguf", family, extra_tensors={tensor: np.ones(64, np.float32)})
    with pytest.raises(UnsupportedModel, match=f"has the tensor {tensor}"):
        open_source(resolve(str(path)), LayerRange(0, 2))


_MEASURE = """
import sys, torch
from peers.weights import open_source
from swarm.models import resolve
from swarm.types import LayerRange

def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

torch.ones(64, 64) @ torch.ones(64, 64)
before = memory("VmRSS")
source = open_source(resolve("smollm2-135m"), LayerRange(10, 20))
held = {name: source.read(name, torch.float32) for name in source.names()}
size = sum(tensor.nbytes for tensor in held.values())
print(size, memory("VmRSS") - before, memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_near_the_size_of_the_range() -> None:
    done = subprocess.run([sys.executable, "-c", _MEASURE], check=True, capture_output=True, text=True, timeout=60)
    size, resident, peak = map(int, done.stdout.split())
    assert size == 10 * 14160384
    assert resident < size + 32e6
    assert peak < size + 48e6


def test_the_source_satisfies_its_protocol(built_in: ModelReference) -> None:
    source: Any = open_source(built_in, LayerRange(29, 30))
    for method in ("names", "shape", "read", "rows", "close"):
        assert callable(getattr(source, method))


def test_the_header_is_read_once_for_profile_and_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = resolve(str(make_gguf(tmp_path / "m.gguf")))
    read: list[Path] = []
    reading = gguf_file.read_header
    monkeypatch.setattr(gguf_file, "read_header", lambda path: read.append(path) or reading(path))
    load_profile(reference)
    for layers in (LayerRange(0, 1), LayerRange(1, 2)):
        open_source(reference, layers).close()
    assert read == [reference.path]
