"""Who is dialled when, and who is taken, by a table of how long each peer takes to answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import pytest

from swarm.control import HopControl
from swarm.errors import NoRoute, SwarmError, Unreachable
from swarm.rivals import RIVAL_S, Rivals
from swarm.testing import run_virtual
from swarm.types import Hop, LayerRange, PeerAddress, PeerId

NEVER = 1e6


class Control(HopControl):
    """Nothing but that it was reached."""

    def __init__(self, hop: Hop) -> None:
        self.hop = hop
        self.aborted = False

    def abort(self, reason: SwarmError | None = None) -> None:
        self.aborted = True


@dataclass
class Scene:
    """``plans`` in the order in which they are best, one letter for each hop; ``answers``: after so many seconds, or
    with an error then if that is negative."""

    plans: list[str]
    answers: Mapping[str, float]
    dialled: list[tuple[str, float]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    controls: list[Control] = field(default_factory=list)
    took_s: float = 0.0

    def plan(self, silent: set[PeerId]) -> list[Hop]:
        for hops in self.plans:
            if not silent.intersection(hops) and not self.refused.keys() & set(hops):
                return [Hop(PeerAddress(PeerId(name), ()), LayerRange(i, i + 1)) for i, name in enumerate(hops)]
        raise NoRoute("nobody is left")

    async def dial(self, hop: Hop) -> HopControl:
        name = str(hop.peer.peer_id)
        self.dialled.append((name, asyncio.get_running_loop().time()))
        await asyncio.sleep(abs(self.answers[name]))
        if self.answers[name] < 0:
            raise Unreachable("refused")
        self.controls.append(Control(hop))
        return self.controls[-1]

    def refuse(self, hop: Hop, error: SwarmError) -> None:
        self.refused[str(hop.peer.peer_id)] = error.message

    def run(self) -> str:
        async def main() -> str:
            began = asyncio.get_running_loop().time()
            won = await Rivals(self.plan, self.dial, self.refuse).reach()
            self.took_s = asyncio.get_running_loop().time() - began
            self.dialled = [(name, at - began) for name, at in self.dialled]
            assert not any(cast(Control, control).aborted for control in won)
            assert all(control.aborted for control in self.controls if control not in won), "a loser is still open"
            return "".join(str(control.hop.peer.peer_id) for control in won)

        return run_virtual(main)


@pytest.mark.parametrize(
    ("plans", "answers", "won", "took_s"),
    [
        (["ab"], {"a": 0.1, "b": 0.2}, "ab", 0.2),
        (["ab", "cb"], {"a": -0.1, "b": 0.3, "c": 0.1}, "cb", 0.3),
        (["a", "b"], {"a": NEVER, "b": 0.1}, "b", RIVAL_S + 0.1),
        (["a", "b", "c", "d"], {"a": NEVER, "b": NEVER, "c": NEVER, "d": 0.1}, "d", 3 * RIVAL_S + 0.1),
        (["ab", "cb"], {"a": NEVER, "b": 0.1, "c": 0.1}, "cb", RIVAL_S + 0.1),
        (["a", "b"], {"a": RIVAL_S + 0.1, "b": 0.3}, "a", RIVAL_S + 0.1),
        (["a"], {"a": 3 * RIVAL_S}, "a", 3 * RIVAL_S),
        (["a", "b"], {"a": 3 * RIVAL_S, "b": -0.1}, "a", 3 * RIVAL_S),
        (["ab", "ac"], {"a": 3 * RIVAL_S, "b": -(RIVAL_S + 0.1), "c": 0.1}, "ac", 3 * RIVAL_S),
    ],
    ids=["both answer", "a refusal", "silence", "much silence", "one is silent", "the first is faster after all",
         "nobody else", "nobody else after all", "the silent one is needed"],
)  # fmt: skip
def test_the_first_plan_that_is_reached_is_taken(
    plans: list[str], answers: dict[str, float], won: str, took_s: float
) -> None:
    scene = Scene(plans, answers)
    assert scene.run() == won
    assert scene.took_s == pytest.approx(took_s)


def test_nobody_is_dialled_twice_or_before_it_is_needed() -> None:
    scene = Scene(["ab", "cb", "d"], {"a": NEVER, "b": 0.1, "c": 0.1, "d": 0.1})
    assert scene.run() == "cb"
    assert scene.dialled == [("a", 0), ("b", 0), ("c", pytest.approx(RIVAL_S))]
    assert list(scene.refused) == ["a"], "the next session does not wait for it"


def test_on_slow_links_nobody_is_blamed_for_being_asked_later() -> None:
    scene = Scene(["a", "b", "c"], dict.fromkeys("abc", 2 * RIVAL_S + 0.1))
    assert scene.run() == "a"
    assert not scene.refused


def test_when_all_have_refused_there_is_no_route() -> None:
    scene = Scene(["ab", "c"], {"a": 0.1, "b": -0.2, "c": -0.1})
    with pytest.raises(NoRoute):
        scene.run()
    assert set(scene.refused) == {"b", "c"}
    assert all(control.aborted for control in scene.controls)
