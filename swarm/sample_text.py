"""Text of any length, always the same: for benchmarks and for trials with faults."""

from __future__ import annotations

from typing import Protocol

TEXT = (
    "The lighthouse keeper wrote down every ship that passed: its name, its flag, the hour, the weather, and what he "
    "thought its sailors were having for supper. One night in autumn a ship passed that had no name and no flag. "
)


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


def sample_prompt(tokenizer: Encoder, tokens: int, shift: int = 0) -> list[int]:
    """``tokens`` ids; another ``shift``, another beginning."""
    ids = tokenizer.encode(TEXT)
    start = shift % len(ids)
    return (ids * ((start + tokens) // len(ids) + 1))[start : start + tokens]
