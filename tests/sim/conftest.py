"""How many seeds: ``--sim-seeds 10000`` or ``--sim-seeds 5000:6000``; a thousand by default."""

from __future__ import annotations

import pytest


@pytest.fixture
def sim_seeds(request: pytest.FixtureRequest) -> range:
    first, _, last = str(request.config.getoption("--sim-seeds")).rpartition(":")
    return range(int(first or 0), int(last))
