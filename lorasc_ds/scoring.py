"""What an evaluation finds of one example, and how it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from lorasc_ds.errors import ConfigError


@dataclass(slots=True)
class Record:
    """What an evaluation found of one example.

    Args:
        loss, count: summed over what the loss is a mean of, and of how much it is.
        prediction: the candidate that was chosen, or the text that was generated.
        scores: mean log-probability of every candidate.
        metrics: of the prediction, by name.
    """

    loss: float = 0.0
    count: int = 0
    prediction: int | str | None = None
    scores: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


@contextmanager
def explaining_memory(
    size: str,
    told: str = "an evaluation ran",
    remedy: str = "lower training.eval_batch_size (--batch_size of launch/evaluate.py)",
) -> Iterator[None]:
    """Turns running out of an accelerator's memory into one line.

    Args:
        size: of the batch, in words.
        told: what ran out.
        remedy: what to do, before the model is cut up.

    Raises:
        ConfigError: it did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{told} out of memory on {size}: {remedy}, or cut the model up by --deepspeed ds_configs/zero3.json"
            f" ({' '.join(str(error).split())[:200]})"
        ) from error
