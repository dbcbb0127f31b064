"""One swarm of the built-in model, and one whole model to compare with, for all live tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from swarm.local import LocalSwarm
from tests.live.helpers import MODEL, THIRDS, Reference, local_swarm


@pytest.fixture(scope="session")
def thirds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    """Three peers with a third of the layers each; a test that takes one away puts one back."""
    # less than the defaults: tests wait for them to run out
    patience = {"SWARM_TIMEOUTS_OPEN_S": "4", "SWARM_TIMEOUTS_OWNER_GRACE_S": "3"}
    with local_swarm(MODEL, THIRDS, tmp_path_factory.mktemp("thirds"), env=patience) as swarm:
        yield swarm


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference.built_in()
