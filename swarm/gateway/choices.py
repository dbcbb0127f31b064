"""The texts of one request, generated at the same time, as pieces in the order in which they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from swarm.config import GatewaySettings
from swarm.errors import Cancelled
from swarm.gateway.buffer import Buffer
from swarm.gateway.generations import LiveGeneration
from swarm.types import Token


@dataclass(frozen=True, slots=True)
class Piece:
    """What has happened to one text: it has a route (nothing else is set), a token more, or its end."""

    index: int
    token: Token | None = None
    finish_reason: str | None = None


@dataclass(slots=True)
class Text:
    """One finished text."""

    tokens: list[Token] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def mean_logprob(self) -> float:
        known = [token.logprob for token in self.tokens if token.logprob is not None]
        return sum(known) / len(known) if known else 0.0


async def pieces(live: Sequence[LiveGeneration], settings: GatewaySettings) -> AsyncGenerator[Piece | None, None]:
    """Each text's pieces in order, texts mixed; None whenever there was none for ``gateway.keep_alive_s``.

    Raises what the first one that fails raises; the others end with it.

    Closing it frees the stages of all. The first piece of each text says that it has a route.
    """
    buffer: Buffer[Piece] = Buffer(settings.max_buffered_tokens, settings.slow_reader_s)
    tasks = [asyncio.create_task(_run(index, one, buffer)) for index, one in enumerate(live)]
    ended = 0
    try:
        while ended < len(live):
            piece = await buffer.get(settings.keep_alive_s)
            ended += piece is not None and piece.finish_reason is not None
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run(index: int, live: LiveGeneration, buffer: Buffer[Piece]) -> None:
    try:
        opened = False
        async with contextlib.aclosing(live):
            async for event in live:
                if isinstance(event, Token):
                    await buffer.put(Piece(index, event))
                elif not opened:  # later ones are rebuilds, which a client doesn't see
                    opened = True
                    await buffer.put(Piece(index))
        if live.result is None:
            raise Cancelled("the generation ended early")
        await buffer.put(Piece(index, finish_reason=live.result.finish_reason))
    except Exception as error:
        # Whatever it is, the request's own task raises it.
        buffer.fail(error)


async def collected(live: Sequence[LiveGeneration], settings: GatewaySettings) -> list[Text]:
    """All texts, whole."""
    texts = [Text() for _ in live]
    async with contextlib.aclosing(pieces(live, settings)) as coming:
        async for piece in coming:
            if piece is None:
                continue
            if piece.token is not None:
                texts[piece.index].tokens.append(piece.token)
            if piece.finish_reason is not None:
                texts[piece.index].finish_reason = piece.finish_reason
    return texts
