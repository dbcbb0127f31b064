"""Who is let in, and who has to go. Whole sessions in too little memory: ``tests/sim/test_room.py``."""

from __future__ import annotations

import asyncio
import gc
import itertools
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import cast

import pytest

from peers.executor import Cache
from peers.outside import Outside
from peers.runner import StageRunner
from peers.stage import Target
from peers.stage_input import OpenRequest, StepMark, Work
from peers.stage_table import OWED_S, StageTable
from swarm import protocol_pb2 as pb
from swarm.errors import Busy
from swarm.sampling import SamplingParams
from swarm.testing import ToyCache
from swarm.types import PeerId, SessionId
from tests.sim import world
from tests.sim.world import NUM_LAYERS, PROFILE, LayerRange, World, run_virtual

LAYERS = LayerRange(0, NUM_LAYERS)
WAIT_S = 30.0
SETTINGS = replace(
    world.SETTINGS,
    timeouts=replace(world.SETTINGS.timeouts, session_idle_s=600.0),
    recovery=replace(world.SETTINGS.recovery, wait_s=WAIT_S),
)


class Silent:
    """An outside to which these stages have nothing to say."""

    local_id = PeerId("here")


def with_table(story: Callable[[StageTable], Awaitable[None]]) -> None:
    """A table with memory for 100 positions, in blocks of four."""

    async def main() -> None:
        swarm = World(0, settings=SETTINGS)
        table = (await swarm.add_peer(LAYERS)).service.table
        table.budget.limit_bytes = table.executor.cache_bytes(LAYERS, 100)
        await story(table)
        for key in list(table.runners):
            table.free(key)
        await swarm.settle()

    run_virtual(main)


def admit(table: StageTable, session: str, longest: int, known: int = 1, prefix: bytes = b"") -> StageRunner:
    """A stage that may have ``longest`` positions, of which so many are known to come."""
    request = OpenRequest(
        session=SessionId(session),
        epoch=1,
        layers=LAYERS,
        max_positions=longest,
        keep=known,
        previous=frozenset(),
        step_mode=True,
        no_kv_cache=False,
        sampling=SamplingParams(),
        token_ids=(),
        end_ids=frozenset(),
        stop_at=longest,
        prompt_length=1,
        prefix=prefix,
    )
    runner = table.admit(PeerId("owner"), request, cast(Outside, Silent()))
    runner.start(1, [])
    return runner


def let_in(table: StageTable, session: str, longest: int, known: int = 1) -> bool:
    try:
        admit(table, session, longest, known)
    except Busy:
        return False
    return True


DEBTOR = "0"
"""Of sessions with as few positions, the one that gives way first."""


def give_way(table: StageTable) -> None:
    """``DEBTOR`` is let in, and can't grow."""
    runner = admit(table, DEBTOR, 10)
    table.budget.reserve(SessionId("another"), table.budget.free_bytes)
    assert not table.make_room(runner, 10)
    table.budget.release(SessionId("another"))


async def newcomers_wait_s(table: StageTable, asked_for: int) -> float:
    """How long, while ``DEBTOR`` goes on asking for so many positions."""
    began = asyncio.get_running_loop().time()
    while not let_in(table, "newcomer", 10):
        assert not let_in(table, DEBTOR, asked_for)
        await asyncio.sleep(0.9 * OWED_S)
    return asyncio.get_running_loop().time() - began


def test_newcomers_wait_until_the_session_that_gave_way_is_back() -> None:
    async def story(table: StageTable) -> None:
        give_way(table)
        assert not let_in(table, "newcomer", 10)
        assert let_in(table, DEBTOR, 10)
        assert let_in(table, "newcomer", 10)

    with_table(story)


def test_newcomers_do_not_wait_for_ever_for_a_session_that_gave_way() -> None:
    async def story(table: StageTable) -> None:
        admit(table, "long", 100)
        admit(table, "longer", 80)
        give_way(table)
        assert 0.8 * WAIT_S < await newcomers_wait_s(table, 100) < WAIT_S + OWED_S

    with_table(story)


def test_nobody_waits_for_a_session_that_asks_for_more_than_there_is() -> None:
    async def story(table: StageTable) -> None:
        give_way(table)
        assert await newcomers_wait_s(table, 101) < 2 * OWED_S

    with_table(story)


def open_sessions(table: StageTable) -> list[str]:
    return sorted(session for session, _ in table.runners)


async def become_idle() -> None:
    await asyncio.sleep(1.1 * SETTINGS.timeouts.evictable_after_s)


def test_idle_sessions_give_up_what_they_were_promised_and_no_more_of_them_than_it_takes() -> None:
    async def story(table: StageTable) -> None:
        admit(table, "older", 100)
        admit(table, "old", 100)
        assert not let_in(table, "new", 100), "nobody is idle yet"
        await become_idle()
        assert let_in(table, "new", 100)
        assert open_sessions(table) == ["new", "old"], "the one that was used last stays"

    with_table(story)


def test_an_idle_session_that_goes_needs_no_block_to_grow_by() -> None:
    async def story(table: StageTable) -> None:
        admit(table, "old", 100, known=90)
        await become_idle()
        assert let_in(table, "new", 100, known=100)
        assert open_sessions(table) == ["new"]

    with_table(story)


def test_no_idle_session_goes_in_vain() -> None:
    async def story(table: StageTable) -> None:
        admit(table, "old", 100)
        await become_idle()
        admit(table, "running", 100, known=80)
        assert not let_in(table, "new", 50, known=50), "there is no memory, whatever was promised"
        assert open_sessions(table) == ["old", "running"]

    with_table(story)


@pytest.mark.parametrize("computing", [True, False])
def test_a_session_that_was_idle_and_goes_on_is_idle_no_longer(computing: bool) -> None:
    async def story(table: StageTable) -> None:
        runner = admit(table, "old", 100, known=60)
        await become_idle()
        admit(table, "passing by", 4)
        runner.accept(Work(epoch=1, start=0, rows=1, token_ids=(1,)))
        if not computing:
            await asyncio.sleep(1.0)
        assert runner.computing == computing
        assert not let_in(table, "new", 60, known=60)
        assert open_sessions(table) == ["old", "passing by"]

    with_table(story)


def test_a_session_whose_owner_is_away_goes_only_when_it_does_not_compute() -> None:
    async def story(table: StageTable) -> None:
        runner = admit(table, "old", 100, known=60)
        runner.accept(Work(epoch=1, start=0, rows=1, token_ids=(1,)))
        table.linger((SessionId("old"), 0))
        assert not let_in(table, "new", 60, known=60)
        await asyncio.sleep(1.0)
        assert let_in(table, "new", 60, known=60)
        assert open_sessions(table) == ["new"]

    with_table(story)


@pytest.mark.parametrize(("known", "taken"), [(1, 0), (31, 0), (32, 32), (36, 32)])
def test_of_an_earlier_session_no_more_is_taken_over_than_there_is_room_reserved_for(known: int, taken: int) -> None:
    async def story(table: StageTable) -> None:
        text = tuple(range(64))
        admit(table, "old", 100, known=64).accept(Work(epoch=1, start=0, rows=64, token_ids=text))
        await asyncio.sleep(10.0)
        table.free((SessionId("old"), 0), prefix=b"oneblockanother.")
        copy, lengths = table.executor.copy_cache, []

        def watched(cache: Cache, length: int, capacity: int) -> Cache:
            lengths.append(length)
            return copy(cache, length, capacity)

        table.executor.copy_cache = watched  # type: ignore[method-assign]
        assert admit(table, "new", 80, known, prefix=b"oneblockanother.").stage.have == taken
        assert lengths == ([taken] if taken else [])

    with_table(story)


def test_a_peer_with_all_the_sessions_that_it_may_have_announces_no_room() -> None:
    async def story(table: StageTable) -> None:
        table.budget.max_sessions = 2
        admit(table, "one", 8)
        assert table.kv_tokens_free() > 0
        admit(table, "two", 8)
        assert table.kv_tokens_free() == 0
        await become_idle()
        assert table.kv_tokens_free() > 0, "idle sessions give way"
        assert let_in(table, "three", 8)

    with_table(story)


@pytest.mark.parametrize(
    ("waiting", "left"),
    [({"a": 60, "b": 40}, "ab"), ({"a": 60, "b": 41}, "b"), ({"a": 50, "b": 51, "c": 60}, "a"), ({"a": 101}, "")],
)
def test_where_frames_that_wait_take_too_much_memory_the_stage_with_most_of_it_goes(
    waiting: dict[str, int], left: str
) -> None:
    async def story(table: StageTable) -> None:
        table.most_waiting_bytes = 100
        for session, size in waiting.items():
            stage = admit(table, session, 8).stage
            stage.inbox.append(Work(epoch=1, start=0, rows=1, hidden=bytes(size)))
        table.bound_waiting()
        assert "".join(session for session, _ in table.runners) == left
        assert let_in(table, "newcomer", 8), "nobody is owed anything"

    with_table(story)


def test_answers_that_an_owner_does_not_read_take_no_more_memory_than_frames_may() -> None:
    """Each stage had a limit of its own, and there may be many."""
    rows = 8
    answer_bytes = 4 * rows * PROFILE.vocab_size

    async def story(table: StageTable) -> None:
        table.most_waiting_bytes = 5 * answer_bytes
        ends = asyncio.Event()

        async def unread(reply: pb.ControlReply) -> None:
            await ends.wait()

        def step(runner: StageRunner, number: int) -> None:
            ids = tuple(range(rows))
            runner.accept(Work(epoch=1, start=0, rows=rows, token_ids=ids, step=StepMark(number, 0, False)))

        runners = [admit(table, session, rows) for session in "abcdefgh"]
        for number, runner in itertools.product((1, 2), runners):
            if number == 1:
                runner.owner.stream = unread
                runner.start(1, [Target(peer=None, layer=0, epoch=1, cursor=0)])
            if runner in table.runners.values():
                step(runner, number)
                await asyncio.sleep(1.0)
            assert sum(each.waiting_bytes for each in table.runners.values()) <= table.most_waiting_bytes
        assert 2 <= len(table.runners) <= 4, "one answer is under way to each owner, and one waits"
        ends.set()
        await asyncio.sleep(1.0)
        assert not any(runner.waiting_bytes for runner in table.runners.values())

    with_table(story)


def test_a_session_that_has_ended_is_held_by_nobody() -> None:
    """Its cache, its log and what waits for it are memory that was given back."""

    async def story(table: StageTable) -> None:
        sweeping = asyncio.create_task(table.sweep())
        ended = weakref.ref(admit(table, "ended", 8))
        await asyncio.sleep(0.15 * SETTINGS.timeouts.session_idle_s)
        table.free((SessionId("ended"), 0))
        gc.collect()
        assert ended() is None
        sweeping.cancel()

    with_table(story)


def test_a_stage_that_ends_gives_all_back_though_its_prefix_can_not_be_copied() -> None:
    """For want of memory on the card. What had been counted as kept could never be dropped."""

    async def story(table: StageTable) -> None:
        def fails(*_: object) -> object:
            raise RuntimeError("out of memory")

        stage = admit(table, "one", 80, known=40).stage
        cast(ToyCache, stage.cache).length = 40
        table.prefixes._copy = fails  # type: ignore[assignment]
        with pytest.raises(RuntimeError):
            table.free((SessionId("one"), 0), prefix=b"oneblock")
        async with asyncio.timeout(1):
            await table.empty()
        assert (table.budget.used_bytes, table.budget.kept_bytes, stage.have) == (0, 0, 40)
        assert not isinstance(stage.cache, ToyCache)

    with_table(story)
