"""What an owner's prompt and tokens wait for beside another owner's many sessions, in rows that are computed."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import replace

import pytest

import swarm.config as config
from peers.batching import Batching, Waiting
from peers.executor import Cache, Done, StepRequest
from peers.service import PeerService
from swarm.errors import Cancelled
from swarm.session import Session
from swarm.testing import SimNode, SimTransport, ToyDecoder
from tests.sim.world import NUM_LAYERS, SETTINGS, LayerRange, Outcome, ToyExecutor, World, run_virtual

PIECE, CHUNK, PASS = 4, 32, 128
ENGINE = config.EngineSettings(PASS, mixed_prefill_tokens=PIECE, prefill_chunk_tokens=CHUNK, replay_chunk_tokens=CHUNK)
MANY, PROMPT = 16, 8 * CHUNK
ROW_S = 0.001


class ThreadExecutor(ToyExecutor):
    """Forms batches as the compute thread does: the next one before those of the last have their next steps here."""

    def __init__(self, node: SimNode, decoder: ToyDecoder, layers: LayerRange, rng: random.Random) -> None:
        super().__init__(node, decoder, layers, rng)
        self.batching = Batching(ENGINE.max_batch_tokens, ENGINE.mixed_prefill_tokens)
        self.rows = 0
        self._arrived = asyncio.Event()
        self.thread = asyncio.create_task(self._work())

    def submit(self, step: StepRequest, done: Done) -> None:
        self.batching.add(Waiting(step, done, asyncio.get_running_loop().time()))
        self._arrived.set()

    def forget(self, cache: Cache) -> None:
        for waiting in self.batching.forget(id(cache)):
            asyncio.get_running_loop().call_soon(waiting.done, Cancelled("forgotten"))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            batch = self.batching.take(loop.time())
            if not batch:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.batching.hold_s(loop.time())):
                        await self._arrived.wait()
                continue
            rows = sum(waiting.piece.rows for waiting in batch)
            await asyncio.sleep(ROW_S * rows)
            self.rows += rows
            answers = [waiting.take(self.computed(waiting.piece), loop.time()) for waiting in batch]
            for waiting, answer in zip(batch, answers, strict=True):
                if answer is None:
                    self.batching.add(waiting)
                else:
                    loop.call_soon(waiting.done, answer)


class BusyWorld(World):
    """Equal stages, and several owners. The first stage counts its rows."""

    async def add_stages(self, stages: int) -> None:
        cuts = [NUM_LAYERS * number // stages for number in range(stages + 1)]
        for number in range(stages):
            node, layers = self.network.add(f"stage{number}"), LayerRange(cuts[number], cuts[number + 1])
            executor = ThreadExecutor(node, self.decoder, layers, self.rng)
            service = PeerService(SimTransport(node), executor, self.directory, self.settings)
            self.announce(await self.start(node, executor, service))

    @property
    def rows(self) -> int:
        executor = self.peers[0].executor
        assert isinstance(executor, ThreadExecutor)
        return executor.rows

    async def ask(self, owner: SimNode, prompt: int, max_tokens: int, on_event: object = None) -> Outcome:
        """A prompt of so many tokens, from ``owner``."""
        self.owner = owner
        return await self.generate([self.rng.randrange(60) for _ in range(prompt)], max_tokens, on_event)

    async def ask_again(self, owner: SimNode, prompt: int, max_tokens: int) -> None:
        while True:
            assert (await self.ask(owner, prompt, max_tokens)).error is None


def rows_until_answered(stages: int, others: int, decoding: int = 0) -> int:
    """Rows that the first stage computes while one owner waits for the first token after its prompt."""

    async def main() -> int:
        world = BusyWorld(1, settings=replace(SETTINGS, engine=ENGINE))
        await world.add_stages(stages)
        one, many, third = (world.network.add(name) for name in ("one", "many", "third"))
        async with asyncio.TaskGroup() as tasks:
            endless = [tasks.create_task(world.ask_again(third, 3, 500)) for _ in range(decoding)]
            endless += [tasks.create_task(world.ask_again(many, 450, 1)) for _ in range(others)]
            await asyncio.sleep(1.0)
            before, rows = world.rows, []

            def on_event(session: Session, index: int) -> None:
                if index == 0:
                    rows.append(world.rows - before)

            assert (await world.ask(one, PROMPT, 1, on_event)).error is None
            for task in endless:
                task.cancel()
        await world.settle()
        return rows[0]

    return run_virtual(main)


@pytest.mark.parametrize("decoding", [0, 2])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_prompt_beside_another_owners_many_has_an_equal_share(stages: int, decoding: int) -> None:
    assert rows_until_answered(stages, 0) == PROMPT
    assert rows_until_answered(stages, MANY, decoding) <= 2 * PROMPT + 2 * PASS, "and what was under way when it came"


@pytest.mark.parametrize("stages", [1, 2])
def test_sessions_decode_equally_fast_whoever_owns_them(stages: int) -> None:
    async def main() -> None:
        world = BusyWorld(1, settings=replace(SETTINGS, engine=ENGINE))
        await world.add_stages(stages)
        one, many = world.network.add("one"), world.network.add("many")
        async with asyncio.TaskGroup() as tasks:
            endless = [tasks.create_task(world.ask_again(many, 3, 500)) for _ in range(MANY)]
            await asyncio.sleep(1.0)
            before = world.rows
            assert (await world.ask(one, 3, 100)).error is None
            for task in endless:
                task.cancel()
        assert world.rows - before < 1.2 * (MANY + 1) * 100
        await world.settle()

    run_virtual(main)
