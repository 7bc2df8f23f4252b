"""Top-1 accuracy and loss of a model of images on a split."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from statistics import fmean as mean

import numpy as np
import torch
from torch import Tensor, nn

from lorasc_ds.image_data import ImageBatch, ImageLayout, evaluation_batch
from lorasc_ds.objectives import class_losses
from lorasc_ds.prefetching import explaining_dead_workers, prefetched
from lorasc_ds.scoring import Record, explaining_memory
from lorasc_ds.sharding import Processes
from lorasc_ds.tasks import Example, Task
from lorasc_ds.tasks.images import groups_of, labels_of


def class_scores(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_size: int,
    layout: ImageLayout,
    processes: Processes,
    poll: Callable[[], None],
    record: Callable[[Example, Record], None] | None = None,
) -> dict[str, float]:
    """Metrics of a split; images that cannot be read are left out, and counted as `unreadable`.

    Args:
        model: from pixels to logits, as `ImageClassifier`.
        poll: called between batches, in all processes at the same ones.
        record: called on the main process for every example, with what was found of it.
    """
    with explaining_dead_workers(layout.workers):
        found = outcomes(model, examples, batch_size, layout, processes, poll)
    if record is not None and processes.main:
        for example, (chosen, loss) in zip(examples, found.tolist(), strict=True):
            read = chosen >= 0
            right = {"accuracy": float(chosen == example.gold[0])} if read else {}
            record(example, Record(loss, int(read), int(chosen) if read else None, metrics=right))
    return metrics(task, examples, found.numpy())


def outcomes(
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    layout: ImageLayout,
    processes: Processes,
    poll: Callable[[], None],
) -> Tensor:
    """Of every example the class that was chosen, -1 where it could not be read, and the loss: float64 of (count, 2).

    The processes take the batches in turn; one without a batch left takes part in the first, since a forward pass may
    gather weights from all.
    """
    starts = range(0, len(examples), batch_size)

    def make(number: int) -> ImageBatch:
        start = starts[number]
        return evaluation_batch([examples[at] for at in range(start, min(start + batch_size, len(examples)))], layout)

    rounds = math.ceil(len(starts) / processes.world_size)
    turns = range(processes.rank, rounds * processes.world_size, processes.world_size)
    numbers = [turn if turn < len(starts) else 0 for turn in turns]
    found = torch.zeros(len(examples), 2, dtype=torch.float64, device=processes.device)
    unreadable: list[str] = []
    for turn, made in zip(turns, prefetched(make, numbers, layout.workers), strict=True):
        poll()
        batch = made.to(processes.device)
        with explaining_memory(batch.size):
            logits = model(batch.pixels)
        if turn < len(starts):
            chosen = logits.argmax(dim=-1).masked_fill(~batch.readable, -1)
            rows = slice(starts[turn], starts[turn] + len(chosen))
            found[rows] = torch.stack([chosen.double(), class_losses(logits, batch).double()], dim=1)
        unreadable += made.unreadable if turn < len(starts) else ()
    for line in (line for part in processes.gather(unreadable) for line in part):
        if processes.main:
            print(f"warning   {line}; left out of the scores", file=sys.stderr, flush=True)
    return processes.sum(found).cpu()


def metrics(task: Task, examples: Sequence[Example], found: np.ndarray) -> dict[str, float]:
    """Accuracy over all images or as the task combines its groups, accuracy by group, and the mean loss.

    Args:
        found: as `outcomes` gives it.
    """
    labels, of_group = np.array(labels_of(examples)), np.array(groups_of(examples))
    readable = found[:, 0] >= 0
    right, groups = (found[:, 0] == labels)[readable], of_group[readable]
    by_group = {group: float(right[groups == group].mean()) for group in dict.fromkeys(groups.tolist())}
    values = {"accuracy": float(right.mean())} if len(right) else {}
    if len(by_group) > 1:
        values |= {"accuracy": mean(by_group.values())} if task.average == "macro" else {}
        values |= {f"accuracy/{group}": value for group, value in by_group.items()}
    if task.combine is not None:
        values |= task.combine(by_group)
    if len(right):
        values["loss"] = float(found[readable, 1].mean())
    if len(right) < len(found):
        values["unreadable"] = float(len(found) - len(right))
    return values
