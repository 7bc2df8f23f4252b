"""How the models of the package are trained on upright digits: seeded and on one thread.

The same versions on the same kind of processor give the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lorasc_ds.tasks.digits import PRETRAINING_IMAGES, TEST_IMAGES

SEED = 0
Indices = NDArray[np.int64]  # of images, (batch,)


def parse(description: str | None, epochs: int) -> argparse.Namespace:
    """The command line of a script, `directory` and `epochs`; from here on all is seeded."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--epochs", type=int, default=epochs, help="fewer for a trial (default: %(default)s)")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    return parser.parse_args()


def pretrain(
    model: torch.nn.Module,
    loss_of: Callable[[Indices], torch.Tensor],
    rng: np.random.Generator,
    *,
    epochs: int,
    batch: int,
    peak_learning_rate: float,
    warm_up: float,
) -> None:
    """AdamW with weight decay, gradients clipped, cosine to zero after a share `warm_up` of all steps."""
    steps_per_epoch = PRETRAINING_IMAGES // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_learning_rate, total_steps=epochs * steps_per_epoch, pct_start=warm_up
    )
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for indices in rng.permutation(PRETRAINING_IMAGES)[: steps_per_epoch * batch].reshape(-1, batch):
            loss = loss_of(indices)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps_per_epoch:.4f}", flush=True)
    model.eval()


def tell_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Print how many of the unseen digits are read rightly.

    Args:
        logits: (TEST_IMAGES, 10).
        labels: (TEST_IMAGES,).
    """
    correct = logits.argmax(-1) == labels
    print(f"accuracy on {TEST_IMAGES} unseen upright digits: {correct.float().mean():.3f}")
