"""``generate`` of a model on the swarm is ``generate`` of the model itself, whatever the way of decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer, pipeline

from swarm.errors import BadRequest
from swarm.huggingface import SwarmForCausalLM
from swarm.local import LocalSwarm
from swarm.types import LayerRange
from tests.live.helpers import MODEL, SETTINGS, STORY, Reference, index_of, only_thirds

pytestmark = [pytest.mark.live, pytest.mark.timeout(180, func_only=True)]

NEW = 12
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 4},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95},
    "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4},
}


@pytest.fixture(scope="module")
def model(thirds: LocalSwarm) -> Iterator[SwarmForCausalLM]:
    with SwarmForCausalLM.from_pretrained(MODEL, initial_peers=thirds.initial_peers, settings=SETTINGS) as connected:
        yield connected


@pytest.fixture(scope="module")
def local(reference: Reference) -> Any:
    return reference.model


@pytest.fixture(scope="module")
def prompt(model: SwarmForCausalLM) -> torch.Tensor:
    return model.tokenizer()(STORY, return_tensors="pt").input_ids[:, :40]


def options(**more: Any) -> dict[str, Any]:
    return {"max_new_tokens": NEW, "eos_token_id": 2, "pad_token_id": 2, **more}


def both(model: SwarmForCausalLM, local: Any, ids: torch.Tensor, seed: int = 0, **more: Any) -> tuple[Any, Any]:
    found = []
    for either in (model, local):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(either.generate(ids, **options(**more)))
    return found[0], found[1]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_way_of_decoding_gives_what_the_whole_model_gives(
    model: SwarmForCausalLM, local: Any, prompt: torch.Tensor, way: dict[str, Any]
) -> None:
    ours, theirs = both(model, local, prompt, **way)
    assert ours.tolist() == theirs.tolist()


def test_a_padded_batch(model: SwarmForCausalLM, local: Any) -> None:
    tokenizer = model.tokenizer()
    batch = tokenizer(["The capital of France is", "Once"], return_tensors="pt", padding=True, padding_side="left")
    found = []
    for either in (model, local):
        with torch.no_grad():
            found.append(either.generate(**batch, **options(do_sample=False)).tolist())
    assert found[0] == found[1]


class At(LogitsProcessor):
    """Changes nothing, and acts once, when the text is so long."""

    def __init__(self, length: int, act: Callable[[], object]) -> None:
        self.length, self.act, self.acted = length, act, False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if input_ids.shape[1] == self.length and not self.acted:
            self.acted = True
            self.act()
        return scores


@pytest.mark.parametrize("way", ["beams", "sampling"])
def test_a_peer_killed_in_the_middle_is_not_seen(
    model: SwarmForCausalLM, thirds: LocalSwarm, local: Any, prompt: torch.Tensor, way: str
) -> None:
    thirds.add(LayerRange(10, 20))
    torch.manual_seed(3)
    with torch.no_grad():
        expected = local.generate(prompt, **options(**WAYS[way])).tolist()
    cache = model.new_cache(128)

    def kill() -> None:
        thirds.kill(index_of(thirds, cache.sessions[0].route.hops[1].peer.peer_id))

    torch.manual_seed(3)
    killing = At(prompt.shape[1] + 4, kill)
    try:
        found = model.generate(
            prompt, past_key_values=cache, logits_processor=LogitsProcessorList([killing]), **options(**WAYS[way])
        )
        assert found.tolist() == expected
        assert killing.acted
        assert sum(len(session.rebuilds) for session in cache.sessions) >= 1
    finally:
        cache.close()
        only_thirds(thirds)


def test_a_second_call_goes_on_with_the_session(model: SwarmForCausalLM, local: Any) -> None:
    tokenizer = model.tokenizer()
    cache = model.new_cache(256)
    messages = [{"role": "user", "content": "Name a colour."}]
    first = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids
    answer = model.generate(first, past_key_values=cache, **options(do_sample=False))
    assert cache.positions_computed == cache.get_seq_length() == answer.shape[1] - 1
    more = tokenizer("<|im_end|>\n<|im_start|>user\nAnother.<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
    second = torch.cat([answer, more.input_ids], dim=1)
    again = model.generate(second, past_key_values=cache, **options(do_sample=False))
    assert cache.positions_computed == again.shape[1] - 1, "nothing was computed twice"
    assert len(cache.sessions) == 1
    with torch.no_grad():
        assert again.tolist() == local.generate(second, **options(do_sample=False)).tolist()
    cache.close()


def test_pipeline_and_text_streamer(
    model: SwarmForCausalLM, local: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = model.tokenizer()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert "not supported" not in caplog.text
    prompt = "The capital of France is"
    said = write(prompt, do_sample=False, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        expected = local.generate(**ids, **options(do_sample=False, max_new_tokens=8))
    assert said == tokenizer.decode(expected[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate(**ids, streamer=streamer, **options(do_sample=False, max_new_tokens=8))
    assert capsys.readouterr().out.strip() == said.strip()


def test_what_can_not_be_is_refused_in_words(model: SwarmForCausalLM, prompt: torch.Tensor) -> None:
    with pytest.raises(BadRequest, match="inputs_embeds"):
        model(prompt, inputs_embeds=torch.zeros(1))
    with pytest.raises(BadRequest, match="attention_mask"):
        model(prompt, attention_mask=torch.ones(1, 3))


def test_logits_of_every_position_and_the_hidden_states_at_the_cuts(
    model: SwarmForCausalLM, local: Any, prompt: torch.Tensor
) -> None:
    with torch.no_grad():
        expected = local(prompt, output_hidden_states=True)
    output = model(prompt, output_hidden_states=True)
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-3, atol=1e-3)
    assert output.cuts == (10, 20, 30)
    for cut, states in zip(output.cuts, output.hidden_states, strict=True):
        torch.testing.assert_close(states, expected.hidden_states[cut], rtol=1e-3, atol=1e-3)
    last = model(prompt, logits_to_keep=2)
    assert last.logits.shape == (1, 2, model.config.vocab_size)
    torch.testing.assert_close(last.logits, expected.logits[:, -2:], rtol=1e-3, atol=1e-3)
