from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peers.families import FAMILIES
from peers.linear import OneDnnLinear, packing_works
from peers.shard import MOST_VIEWS, Shard, Step, StepOutput
from peers.weights import open_source
from swarm.errors import BadTensor, Gap, Internal, ModelError, SwarmError, TooLong, UnsupportedModel, WrongRange
from swarm.models import config_dict, load_profile, resolve
from swarm.types import LayerRange
from tests.reference import ModelSource, built_in_model, profile_of

LAYERS, VOCAB, HIDDEN = 6, 97, 48
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# A window shorter than the test's texts, in some layers only where the family can, and factors that are not 1.
TWISTS: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 5, "logit_scale": 0.5},
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 3, "query_pre_attn_scalar": 8},
    "granite": {
        "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3,
    },
    "mistral": {"sliding_window": 5},
    "olmo3": {"sliding_window": 5},
    "phi3": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "smollm3": {"use_sliding_window": True, "sliding_window": 5, "no_rope_layer_interval": 2},
    "starcoder2": {"sliding_window": 5},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a peer, and kinder to whoever shares the machine
    yield
    torch.set_num_threads(threads)


@cache
def whole(family: str, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **TWISTS.get(family, {}), tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases are ones and zeros at first: mistakes would not show
            parameter.data += torch.randn_like(parameter) * 0.1
    return model


def load(model: Any, layers: LayerRange, **options: Any) -> Shard:
    return Shard.load(profile_of(model.config), model.config.to_dict(), ModelSource(model), layers, **options)


def split(model: Any, *ranges: tuple[int, int]) -> list[Shard]:
    return [load(model, LayerRange(*pair)) for pair in ranges]


def run(shard: Shard, *steps: Step) -> list[StepOutput]:
    outputs = shard.run(steps)
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs


class Chain:
    """Sessions over shards in a row, as stages of several peers would run them."""

    def __init__(self, shards: Sequence[Shard], sessions: int, capacity: int = 64) -> None:
        self.shards = shards
        self.caches = [[shard.new_cache(shard.layers, capacity) for shard in shards] for _ in range(sessions)]

    def feed(self, inputs: dict[int, tuple[int, list[int]]], rows: int | None = None) -> dict[int, torch.Tensor]:
        """``inputs``: session -> (position, token ids), all in one batch; returns logits by session."""
        hidden: dict[int, torch.Tensor | None] = {}
        outputs: list[StepOutput] = []
        for index, shard in enumerate(self.shards):
            last = index == len(self.shards) - 1
            steps = [
                Step(
                    shard.layers,
                    self.caches[session][index],
                    start,
                    token_ids=ids if index == 0 else None,
                    hidden=None if index == 0 else hidden[session],
                    head_rows=(len(ids) if rows is None else rows) if last else 0,
                )
                for session, (start, ids) in inputs.items()
            ]
            outputs = run(shard, *steps)
            hidden = {session: output.hidden for session, output in zip(inputs, outputs, strict=True)}
        logits = [output.logits for output in outputs]
        return {session: rows for session, rows in zip(inputs, logits, strict=True) if rows is not None}


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def texts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB, (count, length), generator=generator).tolist()


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def ragged(chain: Chain, ids: Sequence[list[int]], batches: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """All logits of each session; ``batches`` tell how many of its next tokens each has in a batch."""
    got: list[list[torch.Tensor]] = [[] for _ in ids]
    at = [0] * len(ids)
    for counts in batches:
        inputs = {s: (at[s], ids[s][at[s] : at[s] + count]) for s, count in enumerate(counts)}
        for session, logits in chain.feed(inputs).items():
            got[session].append(logits)
            at[session] += counts[session]
    assert at == [len(text) for text in ids]
    return [torch.cat(logits) for logits in got]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shards_in_a_row_are_the_whole_model(family: str, tied: bool) -> None:
    """Three sessions in ragged batches: prefill in chunks of all sizes beside decode steps."""
    model = whole(family, tied)
    chain = Chain(split(model, (0, 2), (2, 3), (3, 6)), sessions=3)
    ids = texts(3, 23)
    got = ragged(chain, ids, ((7, 1, 3), (1, 9, 6), (14, 12, 13), (1, 1, 1)))
    for text, logits in zip(ids, got, strict=True):
        close(logits, logits_of(model, text))


def test_a_frame_before_the_end_truncates_and_runs() -> None:
    model = whole("qwen3")
    chain = Chain(split(model, (0, 3), (3, 6)), sessions=1)
    first, second = texts(2, 15)
    chain.feed({0: (0, first)})
    joined = first[:6] + second
    close(chain.feed({0: (6, second)})[0], logits_of(model, joined)[6:])
    assert [cache.length for cache in chain.caches[0]] == [21, 21]


def test_a_hop_may_run_a_part_of_what_the_peer_holds() -> None:
    model = whole("gemma3_text")
    left, right = split(model, (0, 5), (1, 6))
    ids = texts(1, 14)[0]
    parts = [(left, (0, 1)), (left, (1, 3)), (right, (3, 4)), (right, (4, 6))]
    hidden = logits = None
    for shard, pair in parts:
        layers = LayerRange(*pair)
        step = Step(layers, shard.new_cache(layers, 20), 0, hidden=hidden)
        if pair[0] == 0:
            step.token_ids = ids
        if pair[1] == LAYERS:
            step.head_rows = 2
        (output,) = run(shard, step)
        hidden, logits = output.hidden, output.logits
    assert hidden is None
    assert logits is not None
    close(logits, logits_of(model, ids)[-2:])


def test_the_last_stage_gives_hidden_states_when_asked() -> None:
    model = whole("llama")
    shard = load(model, LayerRange(0, LAYERS))
    ids = texts(1, 9)[0]
    (output,) = run(shard, Step(shard.layers, shard.new_cache(shard.layers, 9), 0, ids, want_hidden=True))
    with torch.inference_mode():
        wanted = model.model(torch.tensor([ids])).last_hidden_state[0]
    assert output.hidden is not None
    assert output.logits is None
    close(output.hidden, wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_tensors_of_the_range_are_read_each_once(tied: bool) -> None:
    model = whole("llama", tied)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    table, norm = VOCAB * HIDDEN * 4, HIDDEN * 4
    for (start, end), extra in {
        (0, 2): 0,  # rows of the embedding are read as tokens need them
        (2, 4): 0,
        (4, 6): table + norm,
        (0, 6): table + norm,  # the head, which is the embedding too if they are tied
    }.items():
        source, seen = ModelSource(model), []
        shard = Shard.load(
            profile_of(model.config), model.config.to_dict(), source, LayerRange(start, end),
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )  # fmt: skip
        assert len(source.read_names) == len(set(source.read_names)) == len(seen)
        read = {int(name.split(".")[2]) for name in source.read_names if ".layers." in name}
        assert read == set(range(start, end))
        assert shard.size_bytes == (end - start) * layer + extra == seen[-1][0] == seen[-1][1]
        assert ("model.norm.weight" in source.read_names) == (end == LAYERS)


def test_a_bfloat16_shard_stays_near() -> None:
    model = whole("llama")
    shard = load(model, LayerRange(0, LAYERS), dtype=torch.bfloat16)
    ids = texts(1, 9)[0]
    cache_ = shard.new_cache(shard.layers, 9)
    (output,) = run(shard, Step(shard.layers, cache_, 0, ids, head_rows=9))
    assert output.logits is not None
    assert output.logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, logits_of(model, ids), atol=0.05, rtol=0)


def refused(shard: Shard, step: Step) -> SwarmError:
    """The error of ``step``, which must not touch a good step in the same batch."""
    good = Step(step.layers, shard.new_cache(step.layers, 8), 0)
    if step.layers.start == 0:
        good.token_ids = [5, 6]
    else:
        good.hidden = torch.ones(2, HIDDEN)
    bad, fine = shard.run([step, good])
    assert fine.error is None
    assert good.cache.length == 2
    assert bad.error is not None
    assert bad.hidden is None
    assert bad.logits is None
    return bad.error


def test_a_bad_step_is_refused_and_its_neighbours_run() -> None:
    shard = load(whole("llama"), LayerRange(0, 4))
    front, back = LayerRange(0, 2), LayerRange(2, 4)
    tokens = {"token_ids": [1, 2, 3]}

    def error(layers: LayerRange, start: int = 0, capacity: int = 8, **inputs: Any) -> SwarmError:
        return refused(shard, Step(layers, shard.new_cache(layers, capacity), start, **inputs))

    assert isinstance(error(front, start=1, **tokens), Gap)
    assert isinstance(error(front, capacity=2, **tokens), TooLong)
    assert isinstance(error(front, token_ids=[VOCAB]), BadTensor)
    assert isinstance(error(front, token_ids=[-1]), BadTensor)
    assert isinstance(error(front, token_ids=[]), BadTensor)
    assert isinstance(error(front, hidden=torch.ones(2, HIDDEN)), BadTensor)
    assert isinstance(error(back, **tokens), BadTensor)
    assert isinstance(error(back, hidden=torch.ones(2, HIDDEN + 1)), BadTensor)
    assert isinstance(error(back, hidden=torch.ones(HIDDEN)), BadTensor)
    assert isinstance(error(back, hidden=torch.ones(0, HIDDEN)), BadTensor)
    assert isinstance(error(back, hidden=torch.full((2, HIDDEN), math.nan)), BadTensor)
    assert isinstance(error(back, hidden=torch.full((2, HIDDEN), math.inf)), BadTensor)
    assert isinstance(error(back, hidden=torch.ones(2, HIDDEN), head_rows=1), BadTensor), "no head here"
    assert isinstance(refused(shard, Step(front, shard.new_cache(back, 8), 0, [1])), WrongRange)


def test_a_step_that_failed_leaves_the_cache_where_it_began() -> None:
    shard = load(whole("llama"), LayerRange(2, 4))
    own = shard.new_cache(shard.layers, 8)
    run(shard, Step(shard.layers, own, 0, hidden=torch.ones(3, HIDDEN)))
    (output,) = shard.run([Step(shard.layers, own, 2, hidden=torch.full((2, HIDDEN), math.nan))])
    assert isinstance(output.error, BadTensor)
    assert own.length == 2


def test_one_step_of_a_session_a_batch() -> None:
    shard = load(whole("llama"), LayerRange(2, 4))
    own = shard.new_cache(shard.layers, 8)
    step = Step(shard.layers, own, 0, hidden=torch.ones(3, HIDDEN))
    first, second = shard.run([step, step])
    assert first.error is None
    assert isinstance(second.error, Internal)


def test_a_range_outside_is_refused() -> None:
    model = whole("llama")
    with pytest.raises(WrongRange, match="4:7"):
        load(model, LayerRange(4, 7))
    shard = load(model, LayerRange(2, 4))
    with pytest.raises(WrongRange, match="2:4"):
        shard.new_cache(LayerRange(1, 3), 8)


def test_an_unverified_family_is_refused_with_the_list_of_the_others() -> None:
    model = whole("llama")
    config = {**model.config.to_dict(), "model_type": "gpt2"}
    with pytest.raises(UnsupportedModel, match=r"'gpt2'.*llama, mistral"):
        Shard.load(profile_of(model.config), config, ModelSource(model), LayerRange(0, 1))


def test_rotary_embeddings_that_follow_the_longest_sequence_are_refused() -> None:
    model = whole("llama")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = {**model.config.to_dict(), "rope_parameters": rope}
    with pytest.raises(UnsupportedModel, match="dynamic"):
        Shard.load(profile_of(model.config), config, ModelSource(model), LayerRange(0, 1))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_rotary_embeddings_for_a_part_of_each_head_are_refused(family: str) -> None:
    """The kernels would read past the end of their tables; transformers fails at the first token."""
    model = whole(family)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = {**model.config.to_dict(), "rope_parameters": rope}
    with pytest.raises(UnsupportedModel, match="whole heads"):
        Shard.load(profile_of(model.config), config, ModelSource(model), LayerRange(0, 1))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 10000.0}}, "no rope_parameters.rope_type 'spiral'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0}}, ""),
        ({"rope_parameters": "none"}, ""),
        ({"hidden_act": "snake"}, "it knows no hidden_act 'snake'"),
        ({"pad_token_id": VOCAB}, ""),
    ],
)
def test_a_config_that_transformers_cannot_build_is_a_model_error(changes: dict[str, Any], told: str) -> None:
    model = whole("llama")
    config = {**model.config.to_dict(), **changes}
    with pytest.raises(ModelError, match=f"can't build a llama of this config: .*{told}"):
        Shard.load(profile_of(model.config), config, ModelSource(model), LayerRange(0, 1))


def test_missing_and_misshapen_tensors_are_named() -> None:
    model = whole("llama")
    source = ModelSource(model)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = source.tensors.pop(name)
    profile, config = profile_of(model.config), model.config.to_dict()
    Shard.load(profile, config, source, LayerRange(2, 3))
    with pytest.raises(ModelError, match=f"no tensor {name}"):
        Shard.load(profile, config, source, LayerRange(0, 2))
    source.tensors[name] = tensor[:-1]
    with pytest.raises(ModelError, match=f"{name} is .79, 48. in the checkpoint, .80, 48. by the config"):
        Shard.load(profile, config, source, LayerRange(0, 2))


@pytest.mark.parametrize("packed", [False, True])
def test_the_packed_kernel_agrees_with_linear(packed: bool) -> None:
    if not packing_works(torch.float32):
        pytest.skip("no oneDNN here")
    torch.manual_seed(0)
    weight, bias = torch.randn(70, 33), torch.randn(70)
    with torch.inference_mode():
        for rows in (torch.randn(1, 1, 33), torch.randn(1, 17, 33), torch.randn(5, 33)):
            wanted = torch.nn.functional.linear(rows, weight, bias)
            torch.testing.assert_close(OneDnnLinear(weight, bias, packed)(rows), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # transformers takes seconds to read the file
def test_greedy_tokens_of_the_built_in_model_are_those_of_generate() -> None:
    reference = resolve("smollm2-135m")
    profile, config = load_profile(reference), config_dict(reference)
    shards = []
    for layers in (LayerRange(0, 11), LayerRange(11, 20), LayerRange(20, 30)):
        source = open_source(reference, layers)
        shards.append(Shard.load(profile, config, source, layers))
    model = built_in_model()
    prompts = [list(range(900, 921)), [1, 4093, 198, 504, 3575, 282, 4649, 314], [504, 2963]]
    count = 10
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
        done = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        wanted.append(done[0, len(prompt) :].tolist())
    chain = Chain(shards, len(prompts))
    got: list[list[int]] = [[] for _ in prompts]
    inputs = {session: (0, prompt) for session, prompt in enumerate(prompts)}
    for _ in range(count):
        for session, logits in chain.feed(inputs, rows=1).items():
            start, ids_in = inputs[session]
            got[session].append(int(logits[-1].argmax()))
            inputs[session] = (start + len(ids_in), got[session][-1:])
    assert got == wanted


def test_views_of_parts_are_bounded() -> None:
    model = whole("llama")
    shard = load(model, LayerRange(0, LAYERS))
    ids = texts(1, 3)[0]
    ranges = [LayerRange(0, end) for end in range(1, LAYERS + 1)] + [LayerRange(1, end) for end in range(2, LAYERS + 1)]
    hidden = torch.zeros(3, HIDDEN)
    for layers in [*ranges, ranges[0]]:
        step = Step(layers, shard.new_cache(layers, 3), 0)
        if layers.start == 0:
            step.token_ids = ids
        else:
            step.hidden = hidden
        run(shard, step)
    assert len(ranges) > MOST_VIEWS == len(shard._views)
    assert list(shard._views)[-1] == ranges[0]


def test_on_a_card_a_session_with_other_rows_in_its_cache_is_no_company() -> None:
    shard = load(whole("llama"), LayerRange(0, LAYERS))
    steps = [Step(shard.layers, shard.new_cache(shard.layers, 3, kind), 0) for kind in ("model", "int8", "model")]
    assert shard._passes(steps) == [steps]
    shard.device = torch.device("cuda")
    assert shard._passes(steps) == [[steps[1]], [steps[0], steps[2]]]
    assert shard._passes([]) == []
