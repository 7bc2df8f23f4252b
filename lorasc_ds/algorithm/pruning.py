"""ReLoRA's partial reset of the optimizer (arXiv 2307.05695): most elements of each moment become zero."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasc_ds.algorithm.noise import Stream, uniform


def prune_(moment: Tensor, method: str, fraction: float, stream: Stream) -> None:
    """Set a share of the elements of one moment of one parameter to zero, in place.

    Args:
        method: `magnitude`: the smallest by absolute value; `random`: those with the smallest numbers of `stream`;
            `full`: all. Of equals the first go first.
        fraction: how many, rounded to whole elements; not looked at with `full`.
    """
    if method == "full":
        moment.zero_()
        return
    rank_by = moment.abs().flatten() if method == "magnitude" else uniform(stream, moment.numel(), moment.device)
    chosen = torch.argsort(rank_by, stable=True)[: round(fraction * moment.numel())]
    moment.view(-1)[chosen] = 0
