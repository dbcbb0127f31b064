"""What the live tests share: prompts, references to compare with, and generations that can be watched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM

from swarm.client import AsyncClient, Generation
from swarm.config import Settings
from swarm.info import Description, describe
from swarm.local import LocalPeer, LocalSwarm
from swarm.multiaddrs import peer_addresses
from swarm.sampling import SamplingParams, sample
from swarm.session import RouteChanged
from swarm.types import LayerRange, PeerId, Route, Token
from tests.reference import built_in_model

MODEL = "smollm2-135m"
THIRDS = (LayerRange(0, 10), LayerRange(10, 20), LayerRange(20, 30))

_PLACES = ("the harbour", "an old mill", "the railway station", "a quiet village", "the northern border")
_PEOPLE = ("a carpenter", "two sisters", "the retired captain", "a travelling musician")
_DEEDS = ("asked for water", "told a long story about the war", "sold a box of apples", "repaired the broken clock")

STORY = "".join(
    f"On day {day} {_PEOPLE[day % 4]} came to {_PLACES[day % 5]}, walked {day * 7 % 31} miles "
    f"and {_DEEDS[day * 3 % 4]}. "
    for day in range(1, 120)
)


class Reference:
    """What ``transformers`` itself generates with the whole model; answers are kept."""

    def __init__(self, model: Any, end_ids: Sequence[int]) -> None:
        self._model = model
        self._end_ids = list(end_ids)
        self._known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    @classmethod
    def built_in(cls) -> Reference:
        torch.set_num_threads(1)  # as the peers; with more, threads that wait for each other spin
        return cls(built_in_model(), [2])

    @classmethod
    def of_folder(cls, folder: Path, end_ids: Sequence[int] = (0,)) -> Reference:
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), end_ids)

    @property
    def model(self) -> Any:
        return self._model

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        key = tuple(prompt), max_tokens
        if key not in self._known:
            ids = torch.tensor([list(prompt)])
            with torch.inference_mode():
                output = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=max_tokens,
                    eos_token_id=self._end_ids,
                    pad_token_id=self._end_ids[0],
                )
            self._known[key] = output[0, len(prompt) :].tolist()
        return self._known[key]

    def agrees(self, prompt: Sequence[int], generated: Sequence[int]) -> bool:
        """Whether each token is the likeliest after those before it: :meth:`greedy` in one pass, for long texts."""
        tokens = [*prompt, *generated]
        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([tokens[:-1]])).logits[0, len(prompt) - 1 :]
        return logits.argmax(-1).tolist() == list(generated)

    def sampled(self, prompt: Sequence[int], max_tokens: int, params: SamplingParams) -> list[int]:
        """The whole model's logits through our own sampler, whose noise depends on seed and position alone."""
        tokens, cache = list(prompt), None
        feed = torch.tensor([tokens])
        while len(tokens) < len(prompt) + max_tokens:
            with torch.inference_mode():
                output = self._model(feed, None, None, cache, use_cache=True)  # by place: its name has changed
            cache = output.past_key_values
            logits: np.ndarray[Any, Any] = output.logits[0, -1].float().numpy()
            tokens.append(sample(logits, params, len(tokens), tokens, len(prompt)).token_id)
            feed = torch.tensor([tokens[-1:]])
            if tokens[-1] in self._end_ids:
                break
        return tokens[len(prompt) :]


@dataclass
class Watched:
    """A generation as it was seen."""

    token_ids: list[int] = field(default_factory=list)
    routes: list[RouteChanged] = field(default_factory=list)
    result: Generation | None = None

    @property
    def route(self) -> Route:
        return self.routes[-1].route

    @property
    def hops(self) -> list[PeerId]:
        return [hop.peer.peer_id for hop in self.route.hops]


async def watch(
    client: AsyncClient,
    prompt: str | Sequence[int],
    on_token: Callable[[int, Watched], object] | None = None,
    *,
    limit_s: float = 60.0,
    **options: Any,
) -> Watched:
    """Generate; ``on_token(index, watched)`` after each token, and with -1 after each route. Awaits what it returns."""
    seen = Watched()
    stream = client.events(prompt, **options)
    async with asyncio.timeout(limit_s):
        async for event in stream:
            index = -1
            if isinstance(event, Token):
                assert event.index == len(seen.token_ids), "tokens come once and in order"
                seen.token_ids.append(event.token_id)
                index = event.index
            else:
                seen.routes.append(event)
            if on_token is not None:
                done = on_token(index, seen)
                if asyncio.iscoroutine(done):
                    await done
    seen.result = stream.result
    return seen


async def descriptions(client: AsyncClient, swarm: LocalSwarm) -> list[Description]:
    asked = [describe(client.transport, peer, client.settings) for peer in peer_addresses(swarm.initial_peers)]
    return list(await asyncio.gather(*asked))


async def released(client: AsyncClient, swarm: LocalSwarm, limit_s: float = 15.0) -> None:
    """Wait until no living peer holds a stage or a reserved byte."""
    began = time.monotonic()
    while True:
        told = await descriptions(client, swarm)
        held = {d.peer.peer_id[-6:]: (d.sessions, d.kv_bytes_used) for d in told if d.sessions or d.kv_bytes_used}
        if not held:
            return
        assert time.monotonic() - began < limit_s, f"still reserved (stages, bytes): {held}"
        await asyncio.sleep(0.1)


def index_of(swarm: LocalSwarm, peer_id: PeerId) -> int:
    return next(index for index, peer in enumerate(swarm.peers) if peer.peer_id == peer_id)


def living(swarm: LocalSwarm) -> list[LocalPeer]:
    return [peer for peer in swarm.peers if peer.alive]


def only_thirds(swarm: LocalSwarm) -> None:
    """One living peer for each third again, in their order: others rely on it."""
    kept: list[LocalPeer] = []
    for layers in THIRDS:
        found = [peer for peer in living(swarm) if peer.layers == layers]
        kept.append(found[0] if found else swarm.add(layers))
    for peer in living(swarm):
        if peer not in kept:
            swarm.drain(swarm.peers.index(peer))
    swarm.peers[:] = kept


def daemon_of(pid: int) -> int:
    """The p2pd of a process."""
    return next(child.pid for child in psutil.Process(pid).children() if child.name() == "p2pd")


async def until(condition: Callable[[], bool], what: str, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        await asyncio.sleep(0.05)


@contextmanager
def local_swarm(model: str, ranges: Sequence[LayerRange], log_dir: Path, **options: Any) -> Iterator[LocalSwarm]:
    """float32, and whatever the peers say is kept to be shown when a test fails."""
    given: dict[str, Any] = {"dtype": "float32", "extra_args": ["--verbose"], "keep_nursery": True, **options}
    with LocalSwarm(model, ranges, log_dir=log_dir, **given) as swarm:
        yield swarm


SETTINGS = Settings()
"""Not those of the shell or the working directory."""
FROM_ELSEWHERE = replace(SETTINGS, network=replace(SETTINGS.network, unix_sockets=False))
"""Through the p2p daemons, as between machines."""
