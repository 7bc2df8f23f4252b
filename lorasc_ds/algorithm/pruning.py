"""ReLoRA's partial reset of the optimizer (arXiv 2307.05695): most elements of the moments become zero."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasc_ds.algorithm.noise import Stream, uniform


def pruned_elements(first_moment: Tensor, method: str, fraction: float, stream: Stream) -> Tensor:
    """Which elements of a parameter lose their moments: flat indices.

    All moments of an element go together: Adam would step by lr·m/ε where a first moment m is kept and the second is
    not, since the gradient of `A` is 0 while `B` is.

    Args:
        method: `magnitude`: the smallest first moments by absolute value; `random`: those with the smallest numbers of
            `stream`; `full`: all. Of equals the first go first.
        fraction: how many, rounded to whole elements; not looked at with `full`.
    """
    count = first_moment.numel()
    if method == "full":
        return torch.arange(count, device=first_moment.device)
    rank_by = first_moment.abs().flatten() if method == "magnitude" else uniform(stream, 0, count, first_moment.device)
    return torch.argsort(rank_by, stable=True)[: round(fraction * count)]
