"""A network, a clock and a decoder in memory, all seeded: for tests of whatever is built on sessions.

The real session and stage code runs on these unchanged. Time is virtual: the event loop jumps to the next
timer when nothing else is ready, so hours of timeouts pass in milliseconds, and a wait that nothing can
end shows at once as :class:`Deadlock`. The idea is FoundationDB's simulation (Zhou et al., SIGMOD 2021);
the loop follows trio's autojump clock.
"""

from __future__ import annotations

from swarm.testing.clock import Deadlock, VirtualLoop, run_virtual
from swarm.testing.decoder import BROKEN_ROW, ToyCache, ToyDecoder, mix
from swarm.testing.network import Directory, Faults, SimNetwork, SimNode, SimStream, SimTransport

__all__ = [
    "BROKEN_ROW",
    "Deadlock",
    "Directory",
    "Faults",
    "SimNetwork",
    "SimNode",
    "SimStream",
    "SimTransport",
    "ToyCache",
    "ToyDecoder",
    "VirtualLoop",
    "mix",
    "run_virtual",
]
