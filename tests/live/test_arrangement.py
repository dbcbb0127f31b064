"""Peers that choose their own layers: real processes, a real DHT, the built-in model."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm.errors import SwarmError
from swarm.local import LocalSwarm
from tests.bench_arrangement import ROOM_MB, WHOLE, one_start
from tests.live.helpers import MODEL, Reference

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


async def test_six_that_choose_for_themselves_cover_the_model_and_close_a_gap(
    tmp_path: Path, reference: Reference
) -> None:
    """More, and other peers killed: ``python -m tests.bench_arrangement``."""
    one = await one_start(tmp_path, reference, 0)
    print(f"{one.victim} killed: covered again after {one.closed_s:.1f} s, next token after {one.tokens_s:.1f} s")


def test_layers_that_do_not_fit_the_limit_are_refused_with_what_would(tmp_path: Path) -> None:
    with pytest.raises(
        SwarmError, match=r"layers 0:30 need \d+ MB .* max_memory_mb is 200, which is enough for 8 layers"
    ):
        LocalSwarm(MODEL, [WHOLE], dtype="float32", log_dir=tmp_path, env={"SWARM_PEER_MAX_MEMORY_MB": ROOM_MB}).start()
