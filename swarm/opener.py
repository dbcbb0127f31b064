"""What stages are told so that they become a route: ``Open`` and ``Start``, and the rounds in which they go out."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

from swarm import protocol_pb2 as pb
from swarm.control import HopControl, HopLost
from swarm.models import ModelProfile
from swarm.prefix import SessionPrefix
from swarm.protocol import address_to_wire
from swarm.transcript import Tokens
from swarm.types import Hop, SessionId


class Opener:
    """Of one session. ``controls`` are always all hops of a route, in order."""

    def __init__(
        self,
        session_id: SessionId,
        transcript: Tokens,
        prefix: SessionPrefix,
        profile: ModelProfile,
        pass_s: Callable[[Collection[Hop]], float],
    ) -> None:
        """``pass_s``: how long the passes of some hops should take at most."""
        self._session_id = session_id
        self._transcript = transcript
        self._prefix = prefix
        self._profile = profile
        self._pass_s = pass_s

    async def open(self, controls: Sequence[HopControl], epoch: int) -> None:
        """Bring every hop into ``epoch``, truncated to what is committed. Raises ``HopLost``."""
        keep = self._transcript.kept
        await _all(self._open(controls, index, epoch, keep) for index in range(len(controls)))
        # A stage without a log of what its successor lacks has to compute it again, so it forgets it.
        for index in range(len(controls) - 1, 0, -1):
            control, before = controls[index], controls[index - 1]
            if before.log_start > control.have and before.have > control.have:
                await self._open(controls, index - 1, epoch, control.have)
                before.came_with = min(before.came_with or 0, before.have)

    async def tell_last(self, controls: Sequence[HopControl], epoch: int) -> None:
        """Of tokens that were still on their way when the hops were opened. The last stage put them out, but keeps only
        the one that follows the positions which it was to keep: after a draft, or in a late epoch, there are more, and
        it would sample them again and wait for the ring to come to where the owner is. Raises ``HopLost``."""
        last = controls[-1]
        if len(self._transcript) > last.have + 1:
            await self._open(controls, len(controls) - 1, epoch, last.have)

    async def start(self, controls: Sequence[HopControl], epoch: int) -> int:
        """Tell every hop its targets; returns the position from which outputs go round the ring. Raises ``HopLost``.

        Earlier ones come to the owner only: tokens that some stage computed already may reach the last stage before
        the first has caught up, so the owner feeds them in order.
        """
        for control, following in itertools.pairwise(controls):
            with control.blamed():
                await control.start(epoch, [self.target(following, following.have, epoch)])
        first, last, known = controls[0], controls[-1], len(self._transcript)
        ring_from = max(known - 1, *(control.have for control in controls[1:] or controls))
        targets = [pb.Target(epoch=epoch)]
        if self._transcript.step is None:
            targets = [pb.Target(epoch=epoch, forward_from=known - 1), self.target(first, ring_from, epoch)]
        with last.blamed():
            await last.start(epoch, targets)
        return ring_from

    async def _open(self, controls: Sequence[HopControl], index: int, epoch: int, keep: int) -> None:
        control, previous = controls[index], controls[index - 1]  # the first one's is the last: the ring
        keep = min(keep, control.agreed)
        if control.came_with is None:
            keep = min(keep, self._transcript.unchanged)
        message = self.message(control.hop, previous.hop, epoch, keep)
        if control.came_with is None:
            message.prefix = self._prefix.name(keep - 1)  # one position has to be run to sample after it
        with control.blamed():
            await control.open(message, self._pass_s([control.hop]))
        control.agreed = self._transcript.stop_at

    def message(self, hop: Hop, previous: Hop, epoch: int, keep: int) -> pb.Open:
        """For the stage at ``hop``, which takes frames from ``previous``; it may have ``keep`` positions."""
        message = pb.Open(
            session=self._session_id,
            epoch=epoch,
            model=self._profile.model_id,
            start=hop.layers.start,
            end=hop.layers.end,
            max_positions=self._transcript.stop_at,
            keep=keep,
            previous=[previous.peer.peer_id],
            input_wire=self._transcript.wire.into(hop.layers.start),
            output_wire=self._transcript.wire.into(hop.layers.end),
            kv=self._transcript.kv,
        )
        self._transcript.describe(message, last=hop.layers.end == self._profile.num_layers)
        return message

    def target(self, control: HopControl, forward_from: int, epoch: int) -> pb.Target:
        """Outputs at ``forward_from`` and after go to ``control``'s stage."""
        return pb.Target(
            epoch=epoch,
            peer=address_to_wire(control.hop.peer),
            forward_from=forward_from,
            layer=control.hop.layers.start,
        )


async def _all(actions: Iterable[Awaitable[None]]) -> None:
    """At once. Raises the first that failed; the hops of the other losses are given up, too."""
    results = await asyncio.gather(*actions, return_exceptions=True)
    problems = [result for result in results if result is not None]
    for problem in problems[1:]:
        if isinstance(problem, HopLost):
            problem.control.abort(problem.error)
    if problems:
        raise problems[0]
