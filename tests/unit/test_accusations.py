"""Who is replaced when hops say of each other that they can't be reached."""

from __future__ import annotations

import pytest

from swarm.accusations import Accusations
from swarm.types import PeerId

A, B, C, D = map(PeerId, "ABCD")


@pytest.mark.parametrize(
    ("said", "replaced"),
    [
        ([(A, B, True)], [B]),
        ([(A, B, True), (A, B, True)], [B, B]),  # it came back, and still can't be reached
        ([(A, B, True), (A, C, True)], [B, A]),
        ([(A, B, True), (A, C, True), (A, D, True)], [B, A, D]),  # the only peer with its layers is asked once more
        ([(A, B, False), (A, C, False), (A, D, True)], [B, C, D]),  # the dead don't count
        ([(A, B, True), (A, C, False), (A, D, True)], [B, C, A]),
        ([(A, B, True), (C, D, True), (C, A, True)], [B, D, C]),
    ],
)
def test_a_hop_is_believed_once(said: list[tuple[PeerId, PeerId, bool]], replaced: list[PeerId]) -> None:
    accusations = Accusations()
    verdicts = [accusations.believed(accuser, accused, heard=heard) for accuser, accused, heard in said]
    assert [said[i][1] if believed else said[i][0] for i, believed in enumerate(verdicts)] == replaced
