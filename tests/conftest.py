"""What all tests share."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest

# The same examples for everybody: a property that fails, fails for all, and is mended rather than run again. To look
# for new counterexamples: --hypothesis-profile=random, as often as you like.
hypothesis.settings.register_profile("swarm", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("random", deadline=None, database=None)
hypothesis.settings.load_profile("swarm")

# A job that a shell started in the background inherits SIGINT ignored, and so would every command that is tested here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _settings_of_this_shell_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person's SWARM_... variables must not change what the tests see."""
    for name in list(os.environ):
        if name.startswith("SWARM_"):
            monkeypatch.delenv(name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sim-seeds", default="2000", help="seeds for the simulator: COUNT or FIRST:END")
