"""Scores of a model on the splits of a task. Draws no random number and leaves the model's mode as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from lorasc_ds.data import collate
from lorasc_ds.encoding import EncodedExample
from lorasc_ds.objectives import classification_losses, mean_log_probabilities, token_log_probabilities
from lorasc_ds.sharding import Processes
from lorasc_ds.tasks import Scores, Task


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; the mode the model had comes back after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def evaluate(
    model: nn.Module,
    task: Task,
    splits: dict[str, list[EncodedExample]],
    *,
    batch_size: int,
    pad_id: int,
    processes: Processes,
    poll: Callable[[], None] = lambda: None,
) -> Scores:
    """Loss on every split but `train`, and accuracy (`candidates`) or perplexity (`documents`).

    The loss is the one that is trained on. `batch_size` counts the model's inputs, not examples. The
    processes take the batches in turn; all get the same scores, those of one process to the last bit. `poll` is
    called between batches, in all processes at the same ones; what it raises ends the evaluation.
    """

    def sums(chosen: Sequence[EncodedExample]) -> Sums:
        if task.kind == "documents":
            return document_sums(model, chosen, pad_id, processes.device)
        return candidate_sums(model, task.loss, chosen, pad_id, processes.device)

    def score(examples: Sequence[EncodedExample]) -> dict[str, float]:
        total_loss, counted, correct = total(list(batches(examples, batch_size)), sums, processes, poll)
        mean = total_loss / counted
        if task.kind == "documents":
            return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "loss": mean}
        return {"accuracy": correct / len(examples), "loss": mean}

    with evaluation_mode(model):
        return {split: score(examples) for split, examples in splits.items() if split != "train"}


def for_the_loss_alone(examples: Sequence[EncodedExample], task: Task) -> list[EncodedExample]:
    """Examples whose evaluation gives the same loss with the fewest inputs; its accuracy is then of no use."""
    if task.loss == "classification":
        return list(examples)
    return [replace(example, candidates=(example.target,), gold=(0,)) for example in examples]


Sums = tuple[float, int, int]
"""Of a batch: the summed loss, what it is a sum over, and the right predictions."""


def total(
    chosen: Sequence[Sequence[EncodedExample]],
    sums: Callable[[Sequence[EncodedExample]], Sums],
    processes: Processes,
    poll: Callable[[], None],
) -> list[float]:
    """The sums over all batches, each computed by one process."""
    rows = torch.zeros(len(chosen), 3, dtype=torch.float64, device=processes.device)
    for first in range(0, len(chosen), processes.world_size):
        poll()
        mine = first + processes.rank
        # A process without a batch still takes part: a forward pass may gather weights from all.
        row = sums(chosen[mine if mine < len(chosen) else 0])
        if mine < len(chosen):
            rows[mine] = torch.tensor(row, dtype=torch.float64)
    return processes.sum(rows).cpu().sum(dim=0).tolist()


def batches(examples: Sequence[EncodedExample], size: int) -> Iterator[Sequence[EncodedExample]]:
    """Examples of like length together, so that little is padded; at most `size` inputs, or one example."""
    chosen: list[EncodedExample] = []
    inputs = 0
    for example in sorted(examples, key=lambda example: len(example.target.ids)):
        if chosen and inputs + example.inputs > size:
            yield chosen
            chosen, inputs = [], 0
        chosen.append(example)
        inputs += example.inputs
    yield chosen


def candidate_sums(
    model: nn.Module, loss: str, chosen: Sequence[EncodedExample], pad_id: int, device: torch.device
) -> Sums:
    """The candidate of the highest mean log-probability is the prediction; of equals the first."""
    gold = [example.gold[0] for example in chosen]
    batch = collate([example.candidates for example in chosen], gold, pad_id).to(device)
    log_probabilities = token_log_probabilities(model, batch)
    scores = mean_log_probabilities(log_probabilities, batch)
    correct = sum(int(s.argmax()) in example.gold for s, example in zip(scores, chosen, strict=True))
    if loss == "classification":
        return float(classification_losses(log_probabilities, batch).double().sum()), len(chosen), correct
    firsts = [sum(batch.candidates[:i]) for i in range(len(chosen))]
    targets = torch.tensor([f + g for f, g in zip(firsts, gold, strict=True)], device=device)
    of_targets = torch.isin(batch.token_sequence, targets)
    return -float(log_probabilities[of_targets].double().sum()), int(of_targets.sum()), correct


def document_sums(model: nn.Module, chosen: Sequence[EncodedExample], pad_id: int, device: torch.device) -> Sums:
    """The loss over all scored tokens; nothing is predicted."""
    batch = collate([[example.target] for example in chosen], [0] * len(chosen), pad_id).to(device)
    return -float(token_log_probabilities(model, batch).double().sum()), batch.scored_tokens, 0
