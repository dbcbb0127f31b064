"""A swarm generates what ``transformers`` generates with the whole model, token for token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import swarm
from swarm.blocking_client import Client
from swarm.local import LocalSwarm
from swarm.sampling import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.live.helpers import SETTINGS, STORY, Reference

pytestmark = [pytest.mark.live, pytest.mark.timeout(120, func_only=True)]

LENGTHS = (3, 7, 20, 50, 127, 128, 129, 250, 600, 1500)
"""127 to 129: around ``engine.prefill_chunk_tokens``."""


@pytest.fixture(scope="module")
def client(thirds: LocalSwarm) -> Iterator[Client]:
    with swarm.connect(thirds.initial_peers, settings=SETTINGS) as connected:
        yield connected


@pytest.fixture(scope="module")
def story(client: Client) -> list[int]:
    return client.tokenizer.encode(STORY)


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_equals_transformers(client: Client, reference: Reference, story: list[int], length: int) -> None:
    generation = client.generate(story[:length], max_tokens=8, temperature=0)
    assert generation.token_ids == reference.greedy(story[:length], 8)
    assert generation.prompt_tokens == length
    assert [hop.layers.end for hop in generation.route.hops] == [10, 20, 30]
    assert generation.rebuilds == []


def test_without_kv_cache_the_tokens_are_the_same(client: Client, reference: Reference, story: list[int]) -> None:
    for length in (1, 40, 150):
        generation = client.generate(story[:length], max_tokens=6, temperature=0, kv_cache=False)
        assert generation.token_ids == reference.greedy(story[:length], 6)


def test_seeded_sampling_equals_the_whole_model_and_repeats(
    client: Client, reference: Reference, story: list[int]
) -> None:
    prompt = story[:60]
    options = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 2024}
    first, second = (client.generate(prompt, max_tokens=12, **options).token_ids for _ in range(2))
    assert first == second
    assert first == reference.sampled(prompt, 12, SamplingParams(**options))
    assert client.generate(prompt, max_tokens=12, **options | {"seed": 7}).token_ids != first


def test_eight_sessions_at_once_do_not_mix(client: Client, reference: Reference, story: list[int]) -> None:
    prompts = [story[7 * number : 7 * number + 11 + 13 * number] for number in range(8)]
    expected = [reference.greedy(prompt, 8) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(client.generate, prompt, max_tokens=8, temperature=0) for prompt in prompts]
        assert [future.result(60).token_ids for future in futures] == expected


def test_a_stream_is_the_generation_piece_by_piece(client: Client, reference: Reference) -> None:
    prompt = "Write one line about snow ☃ and ice:"
    tokens = list(client.stream(prompt, max_tokens=12, temperature=0))
    whole = client.generate(prompt, max_tokens=12, temperature=0)
    assert [token.token_id for token in tokens] == whole.token_ids
    assert whole.token_ids == reference.greedy(client.tokenizer.encode(prompt), 12)
    assert "".join(token.text for token in tokens) == whole.text
    assert client.tokenizer.decode(whole.token_ids) == whole.text
    assert [[hop.layers.end for hop in token.hops] for token in tokens] == [[10, 20, 30]] * 12


# ---- other families, small random weights ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    name: str
    tied: bool
    ranges: tuple[str, ...]


FAMILIES = (
    Family("llama", False, ("0:1", "1:2", "2:4")),
    Family("mistral", True, ("0:3", "1:4")),
    Family("qwen2", True, ("0:2", "2:4")),
    Family("qwen3", False, ("0:2", "1:4")),
)
ALONE = "llama, all layers at one peer"


@dataclass
class Families:
    folders: dict[str, Path]
    initial_peers: dict[str, list[str]]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Families]:
    """A swarm for each family, and one more with a single peer."""
    folder = tmp_path_factory.mktemp("families")
    found = Families({}, {})
    specs = []
    for family in FAMILIES:
        found.folders[family.name] = make_checkpoint(folder / family.name, family.name, tied=family.tied)
        model = str(found.folders[family.name])
        specs += [{"model": model, "layers": layers, "swarm": family.name} for layers in family.ranges]
    specs.append({"model": str(found.folders["llama"]), "layers": "0:4", "swarm": ALONE})
    script = str(Path(__file__).with_name("many_peers.py"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script, json.dumps(specs)], stdin=-1, stdout=-1, env=environment) as process:
        assert process.stdout is not None
        patience = threading.Timer(90, process.kill)
        patience.start()
        for _ in specs:
            ready = json.loads(process.stdout.readline())
            found.initial_peers.setdefault(ready["swarm"], []).extend(ready["addresses"])
        patience.cancel()
        yield found
        process.kill()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.name}-{'tied' if family.tied else 'untied'}")
def test_small_models_of_each_family(families: Families, family: Family) -> None:
    whole = Reference.of_folder(families.folders[family.name])
    with swarm.connect(families.initial_peers[family.name], settings=SETTINGS) as client:
        for prompt in ("hello world", "the world " * 100):
            ids = client.tokenizer.encode(prompt)
            generation = client.generate(ids, max_tokens=20, temperature=0)
            assert generation.token_ids == whole.greedy(ids, 20)
            assert len(generation.route.hops) == len(family.ranges), "ranges that overlap are used in part"
            assert sum(len(hop.layers) for hop in generation.route.hops) == 4


def test_one_peer_and_three_sample_the_same(families: Families) -> None:
    options = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.3, "seed": 99}
    generations = []
    for name in ("llama", ALONE):
        with swarm.connect(families.initial_peers[name], settings=SETTINGS) as client:
            generations.append(client.generate("hello", **options))
    three, one = generations
    assert (len(three.route.hops), len(one.route.hops)) == (3, 1)
    assert one.token_ids == three.token_ids
