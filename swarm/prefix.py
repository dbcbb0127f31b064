"""Prefixes of texts, as an owner names them to stages, and which peers it had compute them. Pure.

A prefix is named by a hash chain over its token ids: 8 bytes for each block of 32 tokens, of which each depends on all
tokens before it and on the model. The hash has a secret key that every process draws for itself, and a peer for every
thin client whose sessions it owns. So a name tells a peer in the middle of a route nothing but that two sessions of one
owner began alike: nobody can guess a prompt and look whether its name comes by, and the names of two owners have
nothing in common.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from swarm.kv import suffix
from swarm.types import Announcement, ModelId, PeerId, Route
from swarm.wire import Wire

if TYPE_CHECKING:
    from swarm.transcript import Tokens

BLOCK = 32
"""Tokens that are named, and used again, together."""
NAME_BYTES = 8
MOST_REMEMBERED = 256
"""Texts whose routes an owner remembers, those used last."""


def shared_tokens(one: bytes, other: bytes) -> int:
    """How many tokens the beginnings of two chains have in common, in whole blocks."""
    most = min(len(one), len(other)) // NAME_BYTES
    differs = bisect_left(range(1, most + 1), True, key=lambda n: one[: n * NAME_BYTES] != other[: n * NAME_BYTES])
    return differs * BLOCK


def cut(chain: bytes, tokens: int) -> bytes:
    """The chain of the first ``tokens`` tokens, rounded down to blocks."""
    return chain[: tokens // BLOCK * NAME_BYTES]


class Prefixes:
    """Of one owner. ``key``: 1 to 64 secret bytes."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._routes: OrderedDict[bytes, tuple[PeerId, ...]] = OrderedDict()

    def chain(self, model: ModelId, tokens: Sequence[int]) -> bytes:
        """The name of ``tokens``, 8 bytes for each whole block."""
        state, names = self._hash(model.encode()), bytearray()
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            state = self._hash(state + struct.pack(f"<{BLOCK}I", *tokens[end - BLOCK : end]))
            names += state[:NAME_BYTES]
        return bytes(names)

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=16, key=self._key).digest()

    def remember(self, chain: bytes, route: Route) -> None:
        """The peers of ``route`` hold the text that ``chain`` names; longer texts replace their beginnings."""
        if not chain:
            return
        for known in [known for known in self._routes if chain.startswith(known)]:
            del self._routes[known]
        self._routes[chain] = tuple(hop.peer.peer_id for hop in route.hops)
        if len(self._routes) > MOST_REMEMBERED:
            self._routes.popitem(last=False)

    def held(self, chain: bytes) -> dict[PeerId, int]:
        """How many of the text's first tokens each peer should hold; peers that hold none are left out."""
        found: dict[PeerId, int] = {}
        for known, peers in self._routes.items():
            if tokens := shared_tokens(known, chain):
                found.update((peer, max(tokens, found.get(peer, 0))) for peer in peers)
        return found


class SessionPrefix:
    """The beginning of one session's text: its names for stages, and which peers should hold it."""

    def __init__(self, prefixes: Prefixes, model: ModelId, transcript: Tokens) -> None:
        self._prefixes = prefixes
        self._model = model
        self._transcript = transcript

    def name(self, end: int | None = None) -> bytes:
        """Of the tokens before ``end``, or of all, with their rows rounded as this session does; empty if they fill no
        block, or if its text is not to be used again."""
        return self._name(self._transcript.wire, end)

    def _name(self, wire: Wire, end: int | None) -> bytes:
        if not self._transcript.reusable:
            return b""
        return self._prefixes.chain(
            ModelId(f"{self._model}{wire.suffix}{suffix(self._transcript.kv)}"), self._transcript.tokens[:end]
        )

    def held(self) -> dict[PeerId, int]:
        """How many of the first tokens each peer should hold; peers that hold none are left out. Of rounded
        rows, if the route is cut as it was."""
        return self._prefixes.held(self._name(Wire(self._transcript.wire.name), None))

    def remember(self, route: Route) -> None:
        """All tokens were computed by the peers of ``route``."""
        self._prefixes.remember(self._name(Wire(self._transcript.wire.name), None), route)


def reckoned(announcement: Announcement, held: int, prompt_tokens: int) -> Announcement:
    """For planning: a peer that holds ``held`` tokens of the prompt has only the others to compute."""
    if not held:
        return announcement
    share = max(0, prompt_tokens - held) / prompt_tokens
    return replace(announcement, prefill_s_per_token_layer=share * announcement.prefill_s_per_token_layer)
