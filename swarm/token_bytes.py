"""The bytes that a single token stands for: a character may be spread over several tokens, so text won't do. Pure."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_SPACE = "\u2581"


class TokenBytes:
    """Of byte-level tokenizers (GPT-2's kind) and of SentencePiece's with byte fallback."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        decoder = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b"{}"
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(decoder))

    def __getitem__(self, token_id: int) -> bytes:
        """Empty for an id without a token."""
        token = self._tokenizer.id_to_token(token_id) or ""
        if token_id in self._added:
            return token.encode()
        if self._byte_level:
            table = _byte_of_character()
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        if match := _BYTE.match(token):
            return bytes([int(match[1], 16)])
        return token.replace(_SPACE, " ").encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
