"""Deadlines that count only while the process runs, on a virtual clock and on the loop that commands use."""

from __future__ import annotations

import asyncio
import time

import pytest
import uvloop

from swarm.awake import TICK_S, timeout_awake
from swarm.testing import VirtualLoop, run_virtual


def test_a_deadline_without_an_accident_is_one_as_any_other() -> None:
    async def scenario() -> None:
        began = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            async with timeout_awake(3.0):
                await asyncio.Event().wait()
        assert asyncio.get_running_loop().time() - began == pytest.approx(3.0)
        async with timeout_awake(3.0):
            await asyncio.sleep(2.9)
        await asyncio.sleep(5.0)  # nothing of it is left
        with pytest.raises(ValueError, match="as it was"):
            async with timeout_awake(3.0):
                raise ValueError("as it was")

    run_virtual(scenario)


def test_the_time_in_which_the_process_stood_still_does_not_count() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        answered = asyncio.Event()
        for after_s in (0.1, 1.2, 2.4):
            loop.call_later(after_s, loop.stand_still, 60.0)
        began = loop.time()
        with pytest.raises(TimeoutError):
            async with timeout_awake(3.0):
                await answered.wait()
        assert 183.0 - 3 * 2 * TICK_S <= loop.time() - began <= 183.0 + 3 * TICK_S

    run_virtual(scenario)


def test_what_came_while_the_process_stood_still_is_there_before_the_deadline() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        answered = loop.create_future()
        loop.call_later(0.7, time.sleep, 1.0)  # blocks the loop beyond the deadline
        loop.call_later(0.9, answered.set_result, True)
        async with timeout_awake(1.2):
            await asyncio.sleep(0.0)
            assert await answered
            await asyncio.sleep(0.1)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())
