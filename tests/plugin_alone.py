"""Cascades of one process for tests of the plug-in: the data of a short run, models, optimizers and Trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import CASCADE
from plugin_cases import EXPERTS, STEPS, adapted, arguments, batches, preparation_of, rows

from lorasc_ds import Cascade
from lorasc_ds.models import QUICKSTART_BASE

RANK = 8
DATA = {"task.train_examples": 12, "task.dev_examples": 8, "task.test_examples": 10, "training.epochs": 3}
PREPARATION = DATA | CASCADE


def data() -> list[dict[str, torch.Tensor]]:
    return list(batches(preparation_of(QUICKSTART_BASE, PREPARATION)))


def dataset() -> list[dict[str, torch.Tensor]]:
    return rows([preparation_of(QUICKSTART_BASE, PREPARATION)])


def arguments_alone(directory: Path, **more: Any) -> Any:
    return arguments(directory, use_cpu=True, per_device_train_batch_size=4, **more)


def prepared(model: Any = None, **settings: Any) -> Callable[[Path], Cascade]:
    """A cascade on a model and its plain optimizer."""

    def make(directory: Path) -> Cascade:
        module = model() if callable(model) else adapted(QUICKSTART_BASE, rank=RANK)
        optimizer = settings.pop("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))(
            [parameter for parameter in module.parameters() if parameter.requires_grad]
        )
        probe = {"input_ids": torch.arange(12).view(2, 6)}
        defaults = {"steps": STEPS, "experts": EXPERTS, "probe": probe, "directory": directory}
        return Cascade(module, optimizer, **(defaults | settings))

    return make


def trained_a_little(cascade: Cascade) -> None:
    """Something in the pairs for a boundary to merge."""
    for one in cascade.live.weights:
        torch.nn.init.normal_(one.B, std=0.02)
