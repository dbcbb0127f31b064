"""How hidden states travel from stage to stage: the encodings, their sizes, and where a session uses its own. Pure.

A session's owner chooses: ``model``, in the model's dtype, or, where bandwidth is short, ``bfloat16`` or ``int8``. The
owner tells each stage at ``Open`` what comes in and what goes out, so that a replacement encodes alike.

``int8`` is blockwise, as Petals sends hidden states (Borzunov et al., ACL 2023): a row ``[hidden]`` is first the scales
of its blocks of 32 values (the last block may be shorter), in bfloat16, then one signed byte a value; a value is its
byte times its block's scale. That makes 8.5 bits of each value.

Rounded rows are other rows: what the model says differs now and then from what it says with ``model`` (the README has
figures). It does not differ between an undisturbed session and one that was rebuilt:

- a row's encoding depends on this row alone, not on the rows that it was computed or is sent with;
- checkpoint logs hold rows as they are sent, so that a replay sends the same bytes;
- a session rounds where its first route was cut, and nowhere else, as long as it lives. Hops that replace others lie
  between two of these cuts (one peer may get several hops); where they are cut at another layer, rows go over this cut
  in the model's dtype. A route that began as one peer is therefore never rounded.

Two sessions on routes with other cuts may differ. And a row that is computed in a batch of another shape, in a replay
for example, has other last bits, whatever the wire; rounding to ``int8`` makes a whole step of that here and there (a
byte in one row of five). ``tests/bench_accuracy.py`` measures what comes of it: the likeliest token changed at none of
848 positions, as without rounding; arithmetic in bfloat16 changes 2.5% of them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from swarm.errors import BadRequest
from swarm.types import LayerRange

MODEL = "model"
WIRES = (MODEL, "bfloat16", "int8")
"""What an owner may choose."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number, by the dtypes that may travel."""

BLOCK = 32
"""Values that share a scale in ``int8``."""
SCALE_BYTES = 2


def encoding_of(wire: str, dtype: str) -> str:
    """What a frame calls it: a dtype, or ``int8``. ``dtype``: the model's."""
    return dtype if wire == MODEL else wire


def row_bytes(encoding: str, width: int) -> int:
    """Bytes of one row of ``width`` values."""
    if encoding == "int8":
        return width + SCALE_BYTES * -(-width // BLOCK)
    return width * ITEM_BYTES[encoding]


@dataclass(frozen=True, slots=True)
class Wire:
    """A session's choice, and where it holds."""

    name: str = MODEL
    cuts: tuple[int, ...] = ()
    """First layers of the hops of the session's first route; empty as long as it had none. With ``model``, they don't
    matter."""

    def __post_init__(self) -> None:
        if self.name not in WIRES:
            raise BadRequest(f"hidden states can't travel as {reprlib.repr(self.name)}; there are: {', '.join(WIRES)}")
        if self.cuts and self.cuts[0] != 0:
            raise BadRequest("the first hop of a route begins with layer 0")
        if any(earlier >= later for earlier, later in pairwise(self.cuts)):
            raise BadRequest("the cuts of a route are layers in order")

    @classmethod
    def chosen(cls, name: str, dtype: str) -> Wire:
        """For a model of ``dtype``: what is its own dtype is ``model``. Raises :class:`BadRequest`."""
        return cls(MODEL if name == dtype else name)

    def cut_at(self, starts: Iterable[int]) -> Wire:
        """For a session whose first route has hops that begin with these layers, if it is the first."""
        return self if self.name == MODEL or self.cuts else Wire(self.name, tuple(starts))

    @property
    def suffix(self) -> str:
        """Tells models apart that are one and the same but for their rounding."""
        return "" if self.name == MODEL else f" {self.name} {self.cuts}"

    def into(self, layer: int) -> str:
        """In what rows go to the stage that begins with ``layer``."""
        return self.name if layer in self.cuts[1:] else MODEL

    def pieces(self, layers: LayerRange) -> list[LayerRange]:
        """Parts of ``layers`` that hops must not go across."""
        bounds = [layers.start, *(cut for cut in self.cuts if layers.start < cut < layers.end), layers.end]
        return [LayerRange(start, end) for start, end in pairwise(bounds)]


AS_IT_IS = Wire()
"""In the model's dtype."""
