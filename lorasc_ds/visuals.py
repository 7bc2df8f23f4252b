"""What a vision-language model is given of a batch besides the tokens. No transformers here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorasc_ds.encoded import Visuals

Pixels = Callable[[Sequence[Visuals]], dict[str, Tensor]]  # of rows in their order; by the name of the model's input


def image_inputs(
    rows: Sequence[Visuals | None], length: int, pixels: Pixels | None, *, padded_left: bool = False
) -> dict[str, Tensor]:
    """The inputs of a batch's images, and the kinds of its tokens as int64 of (rows, length); padding is of kind 0.

    Args:
        rows: of every row of the batch.
        length: of the rows, in tokens.
    """
    seen = [one for one in rows if one is not None]
    if not seen:
        return {}
    assert pixels is not None
    found = pixels(seen)
    for name, _ in seen[0].kinds:
        kinds = torch.zeros(len(rows), length, dtype=torch.int64)
        for row, one in zip(kinds, rows, strict=True):
            given = torch.tensor(dict(one.kinds)[name][:length] if one is not None else (), dtype=torch.int64)
            row[length - len(given) if padded_left else 0 :][: len(given)] = given
        found[name] = kinds
    return found
