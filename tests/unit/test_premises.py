"""What the p2p daemon needs around it."""

from __future__ import annotations

import tempfile

import pytest

from swarm.errors import ConfigError
from swarm.premises import runtime_folder


def test_without_a_temporary_folder_that_can_be_written_it_is_said_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    with pytest.raises(ConfigError, match="TMPDIR"), runtime_folder():
        pass
