"""Safetensors folders: the wanted tensors only, exactly, and one clear error for each way to be wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peers.weights import open_source
from swarm.errors import ModelError, UnsupportedModel
from swarm.models import resolve
from swarm.types import LayerRange
from tests.checkpoints import FAMILIES, make_checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def read_all(folder: Path, start: int = 0, end: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = open_source(resolve(str(folder)), LayerRange(start, end))
    tensors = {name: source.read(name, dtype) for name in source.names()}
    source.close()
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_loads_into_transformers_model(family: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(tmp_path / "m", family, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = dict(model.named_parameters())
    found = read_all(folder)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000], ids=["single", "sharded"])
def test_a_head_of_its_own_in_a_tied_checkpoint_is_refused(shard_bytes: int, tmp_path: Path) -> None:
    """transformers takes that head; a peer that took the embedding would give other tokens."""
    folder = make_checkpoint(tmp_path / "m", shard_bytes=shard_bytes)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight that is not the embedding.*tie_word_embeddings"):
        read_all(folder)
    assert read_all(folder, 0, 2)  # whoever has not the last layer needs no head


def test_a_tied_checkpoint_may_hold_its_embedding_twice(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", tied=True)
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / SINGLE)
    assert set(read_all(folder)) == set(tensors)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_converted_as_torch_does(stored: str, wanted: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", dtype=stored)
    expected = load_file(folder / SINGLE)
    for name, tensor in read_all(folder, dtype=wanted).items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, expected[name].to(wanted)), name


def test_large_tensors_are_converted_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peers.weights.safetensors_folder.CHUNK_BYTES", 1000)
    folder = make_checkpoint(tmp_path / "m", dtype="bfloat16")
    expected = load_file(folder / SINGLE)
    assert all(torch.equal(tensor, expected[name].float()) for name, tensor in read_all(folder).items())


def test_only_the_files_of_the_range_need_to_be_there(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", shard_bytes=100_000)
    by_tensor = json.loads((folder / INDEX).read_text())["weight_map"]
    files = {file for name, file in by_tensor.items() if name.startswith("model.layers.1.")}
    assert len(set(by_tensor.values())) > len(files) > 0
    whole = read_all(folder)
    for file in set(by_tensor.values()) - files:
        (folder / file).unlink()
    part = read_all(folder, 1, 2)
    assert len(part) == 9
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
    with pytest.raises(ModelError, match=r"model-0000\d-of-\d+\.safetensors can't be read: No such file"):
        read_all(folder)


def test_rows_are_read_singly(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", dtype="bfloat16")
    source = open_source(resolve(str(folder)), LayerRange(0, 1))
    table = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    assert torch.equal(
        source.rows("model.embed_tokens.weight", [383, 0, 5, 5], torch.float32), table[[383, 0, 5, 5]].float()
    )
    assert source.rows("model.embed_tokens.weight", [], torch.float32).shape == (0, 64)
    for wrong in (384, -1):
        with pytest.raises(ModelError, match="rows 0 to 383"):
            source.rows("model.embed_tokens.weight", [wrong], torch.float32)


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / SINGLE).rename(folder / "weights.safetensors")
    assert read_all(folder, 1, 2)
    (folder / "more.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    with pytest.raises(ModelError, match="2 safetensors files but no model"):
        read_all(folder)


def rewrite(folder: Path, change: Any) -> None:
    """The header of the folder's file, changed; the data stays."""
    raw = (folder / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


NORM = "model.layers.2.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.pop(NORM), "lacks the tensor " + NORM),
        (lambda header: header[NORM].update(shape=[32]), "does not fit its place"),
        (lambda header: header[NORM].update(shape=[-64]), "does not fit its place"),
        (lambda header: header[NORM].update(shape=[8, 8]), "has the shape"),
        (lambda header: header[NORM].update(shape="?"), "described wrongly"),
        (lambda header: header[NORM].pop("dtype"), "described wrongly"),
        (lambda header: header.update({NORM: 7}), "described wrongly"),
        (lambda header: header[NORM].update(data_offsets=[0]), "described wrongly"),
        (lambda header: header[NORM].update(data_offsets=[1 << 40, (1 << 40) + 256]), "cut off"),
        (lambda header: header[NORM].update(data_offsets=[-256, 0]), "does not fit its place"),
    ],
)
def test_a_wrong_header_is_explained(change: Any, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    rewrite(folder, change)
    with pytest.raises(ModelError, match=message.replace(".", r"\.")):
        read_all(folder)


def test_a_dtype_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    tensors = load_file(folder / SINGLE)
    tensors[NORM] = tensors[NORM].to(torch.float8_e4m3fn)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(UnsupportedModel, match="F8_E4M3; F64, F32, F16, BF16 can be read"):
        read_all(folder)


def test_a_file_cut_anywhere_is_a_model_error(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    raw = (folder / SINGLE).read_bytes()
    generator = random.Random(5)
    for cut in [0, 1, 7, 8, 9, len(raw) - 1, *(generator.randrange(len(raw)) for _ in range(30))]:
        (folder / SINGLE).write_bytes(raw[:cut])
        with pytest.raises(ModelError, match=r"cut off|no JSON"):
            read_all(folder)
    (folder / SINGLE).write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(ModelError, match="no JSON"):
        read_all(folder)
    (folder / SINGLE).write_bytes(b"\xff" * 8 + raw[8:])
    with pytest.raises(ModelError, match="header reaches past its end"):
        read_all(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ({"weight_map": {NORM: "a.safetensors"}}, "no file holds the tensor"),
        ({"weight_map": {NORM: "../a.safetensors"}}, "no file of the folder"),
        ({"weight_map": {NORM: "/etc/passwd"}}, "no file of the folder"),
        ({"weight_map": {NORM: 3}}, "no file of the folder"),
        ([], "no JSON object"),
    ],
)
def test_a_wrong_index_is_explained(index: Any, message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        read_all(folder)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m")
    (folder / SINGLE).unlink()
    with pytest.raises(ModelError, match="no safetensors file"):
        read_all(folder)


def test_the_fixture_shards_like_the_real_thing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", shard_bytes=100_000)
    index = json.loads((folder / INDEX).read_text())
    for file in set(index["weight_map"].values()):
        with safe_open(folder / file, "pt") as opened:
            assert set(opened.keys()) == {name for name, holder in index["weight_map"].items() if holder == file}
