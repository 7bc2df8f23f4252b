"""DoRA (arXiv 2402.09353): a weight as a direction `W` and a magnitude `m` for every row. The cascade owns `W`."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1 << 12


def row_norms(weight: Tensor) -> Tensor:
    """‖W‖ of every row: float64 of (out,), on the CPU; squares are summed in float64, columns ascending."""
    norms = torch.empty(len(weight), dtype=torch.float64)
    for first in range(0, len(weight), ROWS):
        columns = weight[first : first + ROWS].detach().cpu().double().T.contiguous()
        squares = torch.zeros(columns.shape[1], dtype=torch.float64)
        for column in columns:
            squares.addcmul_(column, column)  # the square of a float32 number is exact in float64
        norms[first : first + ROWS] = squares.sqrt()
    return norms


def shipped_weight(weight: Tensor, magnitude: Tensor) -> Tensor:
    """`m·W/‖W‖` by row, what a model without DoRA layers computes alike: on the CPU, rounded once to W's dtype.

    Args:
        weight: the direction W, (out, in).
        magnitude: m, float32 of (out,).
    """
    norms, magnitude = row_norms(weight), magnitude.detach().cpu().double()
    shipped = torch.empty(weight.shape, dtype=weight.dtype)
    for first in range(0, len(weight), ROWS):
        rows = slice(first, first + ROWS)
        direction = weight[rows].detach().cpu().double()
        shipped[rows] = (magnitude[rows, None] * direction / norms[rows, None]).to(weight.dtype)
    return shipped
