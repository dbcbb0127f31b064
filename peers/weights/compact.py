"""Rows of a matrix in fewer bytes than float32, from which the float32 values follow exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class CompactRows:
    codes: torch.Tensor
    """``[rows, columns]`` of int8, float16 or bfloat16."""
    scales: torch.Tensor | None = None
    """``[rows, groups]`` float32: what each group of neighbouring codes is multiplied with, if anything."""

    def expand(self) -> torch.Tensor:
        """``[rows, columns]`` float32."""
        values = self.codes.to(torch.float32)
        if self.scales is None:
            return values
        rows, groups = self.scales.shape
        return (values.view(rows, groups, -1) * self.scales[:, :, None]).view(rows, -1)

    def slice(self, start: int, stop: int) -> CompactRows:
        return CompactRows(self.codes[start:stop], None if self.scales is None else self.scales[start:stop])
