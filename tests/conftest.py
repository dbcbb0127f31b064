"""What all tests share."""

from __future__ import annotations

import os
import signal
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

# The same examples for everybody: a property that fails, fails for all, and is mended rather than run again. To look
# for new counterexamples: --hypothesis-profile=random, as often as you like.
hypothesis.settings.register_profile("swarm", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("random", deadline=None, database=None)
hypothesis.settings.load_profile("swarm")

# Threads of torch that have nothing to do would look for work for milliseconds, on cores that other tests need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A job that a shell started in the background inherits SIGINT ignored, and so would every command that is tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _settings_of_this_shell_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person's SWARM_... variables must not change what the tests see."""
    for name in list(os.environ):
        if name.startswith("SWARM_"):
            monkeypatch.delenv(name)


class LiveFilesWhole(LoadScopeScheduling):
    """``--dist loadscope``: live tests share peers with those of their file, and run where these are; all others are
    free to run where there is time."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0] if nodeid.startswith("tests/live/") else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LiveFilesWhole | None:
    return LiveFilesWhole(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long does not begin last, when nothing is left to run beside it."""
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("live", "slow")])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sim-seeds", default="1000", help="seeds for the simulator: COUNT or FIRST:END")
