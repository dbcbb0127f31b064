"""``generate`` of a model on the swarm is ``generate`` of the model itself, whatever the way of decoding."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import pipeline
from transformers.generation.streamers import BaseStreamer, TextStreamer

from swarm.errors import BadRequest
from swarm.huggingface import SwarmForCausalLM
from swarm.local import LocalSwarm
from swarm.types import LayerRange
from tests.live.helpers import MODEL, SETTINGS, STORY, THIRDS, Reference, index_of, local_swarm

pytestmark = [pytest.mark.live, pytest.mark.timeout(180, func_only=True)]

NEW = 12


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


@pytest.mark.parametrize(
    "way",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.95},
        {"do_sample": False, "prompt_lookup_num_tokens": 4},
    ],
    ids=["greedy", "beams", "sampling", "lookup"],
)
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


class KillAfter(BaseStreamer):  # type: ignore[misc]
    """Counts tokens, and acts when so many have come."""

    def __init__(self, count: int, act: Any) -> None:
        self.count, self.act, self.tokens = count, act, 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.numel() if value.ndim == 1 else 0
        if self.tokens == self.count:
            self.act()

    def end(self) -> None:
        pass


def test_a_peer_killed_in_the_middle_is_not_seen(tmp_path_factory: pytest.TempPathFactory, local: Any) -> None:
    ranges = [*THIRDS, LayerRange(10, 20)]
    with (
        local_swarm(MODEL, ranges, tmp_path_factory.mktemp("killed")) as swarm,
        SwarmForCausalLM.from_pretrained(initial_peers=swarm.initial_peers, settings=SETTINGS) as model,
    ):
        ids = model.tokenizer()(STORY, return_tensors="pt").input_ids[:, :30]
        cache = model.new_cache(128)

        def kill() -> None:
            victim = cache.sessions[0].route.hops[1].peer.peer_id
            os.kill(swarm.peers[index_of(swarm, victim)].pid, signal.SIGKILL)

        with torch.no_grad():
            expected = local.generate(ids, **options(do_sample=False)).tolist()
        streamer = KillAfter(6, kill)
        found = model.generate(ids, past_key_values=cache, streamer=streamer, **options(do_sample=False))
        assert found.tolist() == expected
        assert streamer.tokens == len(expected[0]) - ids.shape[1]
        assert [len(session.rebuilds) for session in cache.sessions] == [1]
        cache.close()


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


def test_logits_of_every_position_and_the_last_hidden_states(
    model: SwarmForCausalLM, local: Any, prompt: torch.Tensor
) -> None:
    with torch.no_grad():
        expected = local(prompt, output_hidden_states=True)
    output = model(prompt, output_hidden_states=True)
    assert output.past_key_values is None
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.hidden_states[-1], expected.hidden_states[-1], rtol=1e-3, atol=1e-3)
    last = model(prompt, logits_to_keep=2)
    assert last.logits.shape == (1, 2, model.config.vocab_size)
    torch.testing.assert_close(last.logits, expected.logits[:, -2:], rtol=1e-3, atol=1e-3)
