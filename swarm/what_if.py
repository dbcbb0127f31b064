"""Questions to the planner about swarms that don't exist: without a peer, or with one more. Pure."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from swarm.errors import BadRequest, NoRoute, WrongRange
from swarm.plans import Demand, Knowledge
from swarm.routing import plan
from swarm.types import Announcement, LayerRange, PeerAddress, PeerId, PeerState, Route

_SPEC = re.compile(r"^(\d{1,6}:\d{1,6})(?:@(\d+(?:\.\d+)?)ms)?(?:/(\d+(?:\.\d+)?)ms)?$")
FEWEST_CHARACTERS = 4
"""Of a peer id's end that stands for the whole."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """What the planner expects of a changed swarm."""

    change: str
    """``without`` a peer of the route, or with a ``copy`` of it: same layers, speed and links, no queue.

    ``gone``: it isn't announced any more, so there is nothing to ask.
    """
    peer_id: PeerId
    decode_s: float | None
    """From token to token; ``None``: then there is no route."""
    note: str = ""


def alternatives(
    announcements: Sequence[Announcement], route: Route, num_layers: int, demand: Demand, knowledge: Knowledge
) -> list[Alternative]:
    """For each hop of ``route``: without its peer, and with a second one like it."""
    wanted, found = LayerRange(0, num_layers), []
    for hop in route.hops:
        peer = hop.peer.peer_id
        original = next((a for a in announcements if a.peer.peer_id == peer), None)
        if original is None:
            found.append(Alternative("gone", peer, None))
            continue
        try:
            without = plan([a for a in announcements if a is not original], wanted, demand, knowledge)
            found.append(Alternative("without", peer, without.decode_s))
        except NoRoute as error:
            found.append(Alternative("without", peer, None, error.message))
        copy = replace(original, peer=PeerAddress(PeerId(f"copy of {peer}")), queue_s=0.0)
        links = knowledge.links.with_copy(peer, copy.peer.peer_id)
        try:
            extended = plan([*announcements, copy], wanted, demand, replace(knowledge, links=links))
            found.append(Alternative("copy", peer, extended.decode_s))
        except NoRoute as error:
            found.append(Alternative("copy", peer, None, error.message))
    return found


def add_peer(
    announcements: Sequence[Announcement], knowledge: Knowledge, spec: str, num_layers: int
) -> tuple[list[Announcement], Knowledge]:
    """``START:END[@LINKms][/LAYERms]``: one more peer with these layers, ``LINK`` ms one way from everybody.

    Without a link time its links are usual ones, without a time per layer it is as fast as the middle of the others.
    Raises :class:`BadRequest` or ``WrongRange``.
    """
    match = _SPEC.match(spec.strip())
    if match is None:
        raise BadRequest(
            f"{spec!r} is no peer; write START:END, START:END@LINKms or START:END@LINKms/LAYERms, as in 10:20@5ms/1.5ms"
        )
    if not announcements:
        raise BadRequest("nobody is announced, so nobody's speed is known; start a peer first")
    layers = LayerRange.parse(match[1])
    if layers.end > num_layers:
        raise WrongRange(f"{spec.strip()!r} has layers that don't exist: the model's are 0:{num_layers}")
    holders = [a.head_s for a in announcements if a.layers.end == num_layers and a.head_s > 0]
    name, known = f"added {spec.strip()}", {a.peer.peer_id for a in announcements}
    names = (PeerId(name if number == 1 else f"{name} ({number})") for number in itertools.count(1))
    typical = announcements[0]
    added = Announcement(
        peer=PeerAddress(next(new for new in names if new not in known)),
        model=typical.model,
        layers=layers,
        state=PeerState.SERVING,
        version=typical.version,
        decode_s_per_layer=float(match[3]) / 1e3 if match[3] else _middle(a.decode_s_per_layer for a in announcements),
        prefill_s_per_token_layer=_middle(a.prefill_s_per_token_layer for a in announcements),
        kv_tokens_free=max(a.kv_tokens_free for a in announcements),
        step_s=_middle(a.step_s for a in announcements),
        head_s=_middle(holders) if holders and layers.end == num_layers else 0.0,
    )
    new, inner = added.peer.peer_id, knowledge.check
    links = knowledge.links
    if match[2]:
        links = links.with_links(new, [a.peer.peer_id for a in announcements], float(match[2]) / 1e3)
    return [*announcements, added], replace(
        knowledge, links=links, check=lambda a: None if a.peer.peer_id == new else inner(a)
    )


def named(announcements: Sequence[Announcement], name: str) -> PeerId:
    """The peer whose id is ``name`` or ends with it; raises :class:`BadRequest` unless it is exactly one."""
    found = [a.peer.peer_id for a in announcements if a.peer.peer_id.endswith(name)]
    if len(name) < FEWEST_CHARACTERS or len(found) != 1:
        count = ("no peer's id", "one peer's id")[len(found)] if len(found) < 2 else f"the ids of {len(found)} peers"
        least = f"at least {FEWEST_CHARACTERS} characters of "
        raise BadRequest(f"{name!r} is the end of {count}; give {least if len(name) < FEWEST_CHARACTERS else ''}one id")
    return found[0]


def _middle(values: Iterable[float]) -> float:
    return statistics.median(values)
