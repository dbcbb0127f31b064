"""How stages keep keys and values: the kinds, and the size of a row. Pure.

A session's owner chooses: ``model``, in the model's dtype, or ``int8``, which holds almost four times as many tokens in
the memory of float32. All stages of a session keep theirs alike, its replacements too.

In ``int8`` the key, or the value, of one position and one head is a row of signed bytes and their scale in float32: a
number is its byte times the scale, which is the row's largest magnitude / 127. A row depends on nothing but its own
numbers, and every position attends to rows that were rounded, those of its own pass among them. Where the arithmetic
gives a row the same bits in passes of any shape (``peers/compiled_pass.py``), a replacement so keeps what the lost
stage kept. Where it does not (torch's own kernels, or a CPU of another kind), last bits turn a byte here and there into
the next one, and that more of them in the layers above: a session that was rebuilt may then come to another token than
it would have without, as with arithmetic in bfloat16. Tokens that the owner has stay what they are.
"""

from __future__ import annotations

from typing import Final

MODEL: Final = "model"
KINDS: Final = (MODEL, "int8")
"""What an owner may choose."""
SCALE_BYTES: Final = 4


def row_bytes(kind: str, head_dim: int, item_bytes: int) -> int:
    """Of the key, or the value, of one position and one head; ``item_bytes``: a number in the model's dtype."""
    return head_dim + SCALE_BYTES if kind == "int8" else head_dim * item_bytes


def suffix(kind: str) -> str:
    """Tells models apart that are one and the same but for how their keys and values are kept."""
    return "" if kind == MODEL else f" kv {kind}"
