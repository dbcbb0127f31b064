from __future__ import annotations

import pytest

from swarm.daemon_requests import translate
from swarm.errors import Unreachable
from swarm.types import PeerAddress, PeerId

DIALLED = "failed to dial: all dials failed\n  * [/ip4/10.0.0.1/tcp/80] failed to negotiate: {}"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError(DIALLED.format("message did not have trailing newline")), "what listens there is no peer"),
        (RuntimeError(DIALLED.format("connection refused")), "connection refused"),
        (
            RuntimeError("all dials failed\n  * [/ip4/10.0.0.1/tcp/80] dial backoff"),
            "can't reach peer peer: it could not be dialled a moment ago",
        ),
        (RuntimeError("dial: i/o timeout"), "dial: i/o timeout"),
        (TimeoutError(), "did not answer within 5 s"),
        (RuntimeError("Daemon failed to start: no transport"), "the own p2p daemon does not start: no transport"),
        (RuntimeError("Daemon failed to start in 60.0 seconds"), "daemon does not start in 60.0 seconds"),
        (RuntimeError("protocols not supported: [x]"), "does not speak this protocol"),
    ],
)
def test_what_p2pd_says_is_told_in_words(error: Exception, told: str) -> None:
    found = translate(error, PeerAddress(PeerId("peer"), ()), 5.0)
    assert isinstance(found, Unreachable)
    assert found.message.endswith(told)
