"""Scores of a model on the splits of a task. Draws no random number and leaves the model's mode as it was."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lorasc_ds.data import collate
from lorasc_ds.encoding import EncodedExample
from lorasc_ds.objectives import classification_losses, mean_log_probabilities, token_log_probabilities
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
) -> Scores:
    """Loss on every split, and accuracy (`candidates`) or perplexity (`documents`).

    The loss is the one that is trained on. `batch_size` counts the model's inputs, not examples.
    """
    score = perplexity if task.kind == "documents" else accuracy
    with evaluation_mode(model):
        return {split: score(model, task.loss, splits[split], batch_size, pad_id) for split in task.evaluation_splits}


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


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def accuracy(
    model: nn.Module, loss: str, examples: Sequence[EncodedExample], batch_size: int, pad_id: int
) -> dict[str, float]:
    """The candidate of the highest mean log-probability is the prediction; of equals the first."""
    correct, total_loss, counted = 0, 0.0, 0
    for chosen in batches(examples, batch_size):
        gold = [example.gold[0] for example in chosen]
        batch = collate([example.candidates for example in chosen], gold, pad_id).to(device_of(model))
        log_probabilities = token_log_probabilities(model, batch)
        scores = mean_log_probabilities(log_probabilities, batch)
        correct += sum(int(s.argmax()) in example.gold for s, example in zip(scores, chosen, strict=True))
        if loss == "classification":
            total_loss += float(classification_losses(log_probabilities, batch).double().sum())
            counted += len(chosen)
        else:
            firsts = [sum(batch.candidates[:i]) for i in range(len(chosen))]
            targets = torch.tensor(
                [f + g for f, g in zip(firsts, gold, strict=True)], device=batch.token_sequence.device
            )
            of_targets = torch.isin(batch.token_sequence, targets)
            total_loss -= float(log_probabilities[of_targets].double().sum())
            counted += int(of_targets.sum())
    return {"accuracy": correct / len(examples), "loss": total_loss / counted}


def perplexity(
    model: nn.Module, loss: str, examples: Sequence[EncodedExample], batch_size: int, pad_id: int
) -> dict[str, float]:
    """exp of the mean loss over all scored tokens."""
    total_loss, counted = 0.0, 0
    for chosen in batches(examples, batch_size):
        batch = collate([[example.target] for example in chosen], [0] * len(chosen), pad_id).to(device_of(model))
        total_loss -= float(token_log_probabilities(model, batch).double().sum())
        counted += batch.scored_tokens
    mean = total_loss / counted
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "loss": mean}
