"""Rows through all layers in one compiled call: what the modules give, whoever shares the call."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from peers import compiled as compiled_module
from peers import loading
from peers.attention_kernel import attention_kernel
from peers.block_kernels import block_kernels
from peers.kv_cache import SequenceCache
from peers.linear import packing_works
from peers.shard import Shard, Step
from peers.weights import open_source
from swarm.errors import BadTensor
from swarm.models import config_dict, load_profile, resolve
from swarm.types import LayerRange
from tests.checkpoints import FAMILIES, make_config, write_checkpoint

TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    if block_kernels() is None:
        pytest.skip("no C compiler here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["as it is", "no AVX-512", "no AVX"])
def _processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels as they are compiled for this processor, or for one with less."""
    narrower = {"no AVX-512": ("-mno-avx512f",), "no AVX": ("-mno-avx512f", "-mno-avx2", "-mno-avx", "-mno-fma")}
    if request.param in narrower and platform.machine() != "x86_64":
        pytest.skip("another kind of processor")
    monkeypatch.setattr(compiled_module, "FLAGS", (*compiled_module.FLAGS, *narrower.get(request.param, ())))
    for kernels in (block_kernels, attention_kernel):
        kernels.cache_clear()
    yield
    for kernels in (block_kernels, attention_kernel):
        kernels.cache_clear()


def shard_of(path: Path, family: str, weights: str = "auto", dtype: str = "float32", **changes: object) -> Shard:
    write_checkpoint(
        path,
        {
            **make_config(family, tied=False, layers=4, hidden=128, vocab=384, dtype="float32"),
            "sliding_window": 5,
            **changes,
        },
    )
    reference = resolve(str(path), dtype, weights=weights)
    profile, layers = load_profile(reference), LayerRange(0, 4)
    kind = getattr(torch, dtype)
    return Shard.load(profile, config_dict(reference), open_source(reference, layers), layers, dtype=kind)


def logits_of(shard: Shard, texts: list[list[int]], chunk: int) -> list[torch.Tensor]:
    """Of each text, run side by side in chunks."""
    caches = [shard.new_cache(shard.layers, len(TEXT)) for _ in texts]
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    for start in range(0, max(map(len, texts)), chunk):
        running = [index for index, text in enumerate(texts) if start < len(text)]
        steps = []
        for index in running:
            ids = texts[index][start : start + chunk]
            steps.append(Step(shard.layers, caches[index], start, token_ids=ids, head_rows=len(ids)))
        for index, output in zip(running, shard.run(steps), strict=True):
            assert output.error is None
            assert output.logits is not None
            found[index].append(output.logits)
    return [torch.cat(parts) for parts in found]


def passes(shard: Shard) -> int:
    return sum(view._pass is not None for view in shard._views.values())


@pytest.mark.parametrize("weights", ["auto", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_gives_what_the_modules_give(family: str, weights: str, tmp_path: Path) -> None:
    shard = shard_of(tmp_path, family, weights)
    (found,) = logits_of(shard, [TEXT], 3)
    assert passes(shard) == 1, "the kernels do not take this model"
    for view in shard._views.values():
        view._pass = None
    (wanted,) = logits_of(shard, [TEXT], 3)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    assert not torch.equal(found, wanted), "the same code ran twice"


@pytest.mark.parametrize("weights", ["auto", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_comes_nearer_to_float32_than_the_modules_do(family: str, weights: str, tmp_path: Path) -> None:
    """They round between products, too."""
    shard, exact = shard_of(tmp_path, family, weights, "bfloat16"), shard_of(tmp_path, family, weights)
    wanted = logits_of(exact, [TEXT], 3)[0]
    found = logits_of(shard, [TEXT], 3)[0]
    assert passes(shard) == 1, "the kernels do not take this model"
    for view in shard._views.values():
        view._pass = None
    by_modules = logits_of(shard, [TEXT], 3)[0]
    error = (found - wanted).abs().mean()
    assert 0 < error < (by_modules - wanted).abs().mean()
    assert error < 0.02 * wanted.abs().mean()


@pytest.fixture(params=["multiplied", "widened", "unpacked"])
def _bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the processor multiplies it, as if it did not, and as if oneDNN did not know it either."""
    kernels = block_kernels()
    assert kernels is not None
    if request.param == "unpacked":
        monkeypatch.setattr(loading, "packing_works", lambda dtype: dtype != torch.bfloat16 and packing_works(dtype))
    if request.param != "multiplied":
        monkeypatch.setattr(kernels, "multiplies_bfloat16", False)
    elif not kernels.multiplies_bfloat16:
        pytest.skip("this processor does not")


@pytest.mark.usefixtures("_processor", "_bfloat16")
@pytest.mark.parametrize(
    ("weights", "dtype"), [("auto", "float32"), ("int4", "float32"), ("auto", "bfloat16"), ("int4", "bfloat16")]
)
def test_a_session_gets_the_same_bits_alone_and_among_others(weights: str, dtype: str, tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "llama", weights, dtype)
    texts = [TEXT, TEXT[3:], TEXT[:5], *([TEXT[1:9]] * 8)]
    for chunk in (1, 2, 16):
        together = logits_of(shard, texts, chunk)
        alone = [logits_of(shard, [text], chunk)[0] for text in texts]
        assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


LONG = [(7 * i * i + 3 * i) % 380 + 1 for i in range(150)]


def hidden_of(shard: Shard, chunk: int, kv: str) -> torch.Tensor:
    cache = shard.new_cache(shard.layers, len(LONG), kv)
    found = []
    for start in range(0, len(LONG), chunk):
        step = Step(shard.layers, cache, start, token_ids=LONG[start : start + chunk], want_hidden=True)
        (output,) = shard.run([step])
        assert output.hidden is not None
        found.append(torch.as_tensor(output.hidden))
    return torch.cat(found)


@pytest.mark.usefixtures("_processor")
@pytest.mark.parametrize("weights", ["auto", "bfloat16", "int8", "int4"])
def test_rows_get_the_same_bits_in_chunks_of_any_size(weights: str, tmp_path: Path) -> None:
    """What a stage replays in chunks, a lost one had in steps."""
    assert_the_same_in_any_chunks(shard_of(tmp_path, "llama", weights))


@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_bfloat16_do_so_too(family: str, weights: str, tmp_path: Path) -> None:
    assert_the_same_in_any_chunks(shard_of(tmp_path, family, weights, "bfloat16"))


def assert_the_same_in_any_chunks(shard: Shard) -> None:
    for kv in ("model", "int8"):
        in_steps = hidden_of(shard, 1, kv)
        assert passes(shard) == 1, "the kernels do not take this model"
        for chunk in (7, 64, len(LONG)):
            assert torch.equal(hidden_of(shard, chunk, kv), in_steps), (kv, chunk)


@pytest.mark.parametrize("changes", [{"head_dim": 24}, {"attention_bias": True}])
def test_what_the_kernels_do_not_know_goes_through_the_modules(changes: dict[str, object], tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "llama", **changes)
    logits_of(shard, [TEXT], 1)
    assert passes(shard) == 0


@pytest.mark.usefixtures("_processor", "_bfloat16")
@pytest.mark.parametrize(
    ("weights", "dtype"),
    [("auto", "float32"), ("bfloat16", "float32"), ("int4", "float32"), ("auto", "bfloat16"), ("int4", "bfloat16")],
)
def test_any_number_of_threads_gives_the_same_bits(weights: str, dtype: str, tmp_path: Path) -> None:
    shard = shard_of(tmp_path, "qwen3", weights, dtype)
    texts = [TEXT, TEXT[3:], TEXT[:5]]
    alone = logits_of(shard, texts, 2)
    for threads in (2, 3, 64):
        torch.set_num_threads(threads)
        assert all(torch.equal(*pair) for pair in zip(logits_of(shard, texts, 2), alone, strict=True)), threads


@pytest.mark.parametrize("kv", ["model", "int8"])
@pytest.mark.parametrize("seen", [3, 63, 64])
def test_rows_that_are_not_finite_hurt_neither_their_company_nor_what_comes_next(
    seen: int, kv: str, tmp_path: Path
) -> None:
    shard, layers = shard_of(tmp_path, "llama"), LayerRange(1, 3)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(seen + 1, 128, generator=generator)
    bad = torch.full((9, 128), float("nan"))

    def opened() -> SequenceCache:
        cache = shard.new_cache(layers, seen + 9, kv)
        assert shard.run([Step(layers, cache, 0, hidden=rows[:seen])])[0].error is None
        return cache

    def following(cache: SequenceCache) -> Step:
        return Step(layers, cache, seen, hidden=rows[seen:])

    (wanted,) = shard.run([following(opened())])
    broken = opened()
    refused, beside = shard.run([Step(layers, broken, seen, hidden=bad), following(opened())])
    assert isinstance(refused.error, BadTensor)
    (after,) = shard.run([following(broken)])
    assert wanted.hidden is not None
    for output in (beside, after):
        assert output.hidden is not None
        torch.testing.assert_close(output.hidden, wanted.hidden, atol=0, rtol=0)
    assert passes(shard) == 1
