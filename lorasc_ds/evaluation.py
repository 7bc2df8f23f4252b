"""Scores of a model on the splits of a task. Draws no random number and leaves the model's mode as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import fmean as mean
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorasc_ds.data import Batch, collate
from lorasc_ds.encoded import EncodedExample, ScoredTokens
from lorasc_ds.errors import ConfigError
from lorasc_ds.generation import Generator
from lorasc_ds.image_data import ImageLayout
from lorasc_ds.image_evaluation import class_scores
from lorasc_ds.layout import Layout, trees_of
from lorasc_ds.objectives import mean_log_probabilities, scored_logits, token_log_probabilities
from lorasc_ds.scoring import Record, explaining_memory
from lorasc_ds.sharding import Processes
from lorasc_ds.tasks import Scores, Task

T = TypeVar("T")


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
    splits: Mapping[str, Sequence[Any]],
    *,
    batch_size: int,
    layout: Layout | ImageLayout,
    processes: Processes,
    poll: Callable[[], None] = lambda: None,
    generator: Generator | None = None,
    record: Callable[[str, Any, Record], None] | None = None,
) -> Scores:
    """Loss on every split, and the metrics of the task's kind.

    `accuracy` (`candidates`), `perplexity` (`sequences`, `documents`), or those of the task's `generation`; each of
    them also by group, as `METRIC/GROUP`, where there are several. The loss is the one that is trained on.
    `batch_size` counts the rows that the model reads at once. The processes take the batches in turn; all get the same
    scores, those of one process to the last bit.

    Args:
        poll: called between batches, in all processes at the same ones; what it raises ends the evaluation.
        generator: generates answers; None: only the loss of a task of kind `generation` is computed.
        record: called on the main process for every example, in the order of its split.
    """

    def score(split: str, examples: Sequence[Any]) -> dict[str, float]:
        if isinstance(layout, ImageLayout):
            return class_scores(
                model,
                task,
                examples,
                batch_size=batch_size,
                layout=layout,
                processes=processes,
                poll=poll,
                record=None if record is None else partial(record, split),
            )
        records = [Record() for _ in examples]
        scored = [at for at, example in enumerate(examples) if example.candidates]
        if scored:
            sums = losses(model, task, [examples[at] for at in scored], batch_size, layout, processes, poll)
            for at, (loss, count, chosen, *candidates) in zip(scored, sums.tolist(), strict=True):
                records[at].loss, records[at].count = loss, int(count)
                if task.kind == "candidates":
                    records[at].prediction = int(chosen)
                    records[at].scores = candidates[: len(examples[at].candidates)]
                    records[at].metrics = {"accuracy": float(int(chosen) in examples[at].gold)}
        if generator is not None:
            answered(generator, examples, records, batch_size, processes, poll)
        if record is not None and processes.main:
            for example, one in zip(examples, records, strict=True):
                record(split, example, one)
        return summary(task, examples, records)

    with evaluation_mode(model):
        return {split: score(split, examples) for split, examples in splits.items()}


def check_layout(model: nn.Module, layout: Layout, device: torch.device) -> None:
    """Try rows that sequences share: none may see another, and each must be as in a row of its own.

    Raises:
        ConfigError: the model does not heed what a token is told to see.
    """
    shared = [replace(layout, pack=False, flat=False)] if layout.share_prefixes else []
    packed = [replace(layout, share_prefixes=False)] if layout.pack or layout.flat else []

    def logits_of_last(layout: Layout, *neighbours: int) -> Tensor:
        texts = (1, 2, 3, *neighbours, *neighbours, *neighbours), (1, 2, 3, *neighbours), (1, 2, 3, 5, 6, 7)
        sequences = [ScoredTokens(text, 2) for text in texts]  # packed, the short ones share a row
        examples = [sequences] if layout.share_prefixes else [[one] for one in sequences]
        with evaluation_mode(model):
            return scored_logits(model, collate(examples, [0] * len(examples), layout).to(device))[-2:]

    rounding = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.2
    for tried in (*shared, *packed):
        alone, together = logits_of_last(Layout(layout.pad_id), 8, 9, 8), logits_of_last(tried, 8, 9, 8)
        leak = (together - logits_of_last(tried, 9, 8, 9)).abs().max() / alone.std()
        change = (together - alone).abs().max() / alone.std()
        if leak > 1e-4 or change > rounding:
            raise ConfigError(
                "training.share_prefixes and training.packing need a model that sees of a row what it is told to see,"
                f" and this one does not (logits move by {max(float(leak), float(change)):.2g} of their standard"
                " deviation): set both false"
            )


def check_images(model: nn.Module, batch: Batch) -> None:
    """Try another last token in a row with images: what is predicted before it must not change.

    Args:
        batch: one row.

    Raises:
        ConfigError: it does.
    """
    other = batch.input_ids.clone()
    other[:, -1] = batch.token_target[-1]
    with evaluation_mode(model):
        before, after = (scored_logits(model, replace(batch, input_ids=ids))[:-1] for ids in (batch.input_ids, other))
    if before.numel() and (before - after).abs().max() > 1e-3 * before.std():
        raise ConfigError(
            "model.name_or_path: where there are images, the model lets a token of an answer see those after it, so"
            " that the loss would be that of a copy; take another vision-language model"
        )


def summary(task: Task, examples: Sequence[EncodedExample], records: Sequence[Record]) -> dict[str, float]:
    """The metrics of a split: means over its examples, or over the means of its groups."""
    found: dict[str, float] = {}
    groups = dict.fromkeys(example.group for example in examples)
    for metric in dict.fromkeys(name for one in records for name in one.metrics):
        by_group = {
            group: mean([r.metrics[metric] for e, r in zip(examples, records, strict=True) if e.group == group])
            for group in groups
        }
        macro = task.average == "macro"
        found[metric] = mean(by_group.values() if macro else [one.metrics[metric] for one in records])
        found |= {f"{metric}/{group}": value for group, value in by_group.items()} if len(groups) > 1 else {}
    count = sum(one.count for one in records)
    if count:
        loss = sum(one.loss for one in records) / count
        if task.kind in ("sequences", "documents"):
            found["perplexity"] = math.exp(loss) if loss < 700 else math.inf
        found["loss"] = loss
    return found


def for_the_loss_alone(examples: Sequence[Any], task: Task) -> Sequence[Any]:
    """Examples whose evaluation gives the same loss with the fewest inputs; its accuracy is then of no use."""
    if task.loss == "classification":
        return examples
    return [replace(example, candidates=(example.target,), gold=(0,)) for example in examples]


def in_turn(batches: Sequence[T], processes: Processes, poll: Callable[[], None]) -> Iterator[tuple[T, bool]]:
    """This process's batches, and whether it counts.

    A process without a batch still takes part, in the first: a forward pass may gather weights from all.
    """
    for first in range(0, len(batches), processes.world_size):
        poll()
        mine = first + processes.rank
        yield batches[mine if mine < len(batches) else 0], mine < len(batches)


def losses(
    model: nn.Module,
    task: Task,
    examples: Sequence[EncodedExample],
    batch_size: int,
    layout: Layout,
    processes: Processes,
    poll: Callable[[], None],
) -> Tensor:
    """Of every example its summed loss, what that is a sum over, the best candidate and all their scores.

    The candidate of the highest mean log-probability is the prediction; of equals the first.

    Returns:
        float64 of (examples, 3 + most candidates), on the CPU.
    """
    width = max(len(example.candidates) for example in examples)
    found = torch.zeros(len(examples), 3 + width, dtype=torch.float64, device=processes.device)
    for members, counts in in_turn(list(batches(examples, batch_size, layout)), processes, poll):
        chosen = [examples[at] for at in members]
        gold = [example.gold[0] for example in chosen]
        batch = collate([example.candidates for example in chosen], gold, layout).to(processes.device)
        with explaining_memory(batch.size):
            log_probabilities = token_log_probabilities(model, batch).double()
        scores = mean_log_probabilities(log_probabilities, batch)
        of_sequences = log_probabilities.new_zeros(sum(batch.candidates))
        totals = of_sequences.index_add(0, batch.token_sequence, log_probabilities).split(batch.candidates)
        for at, example, total, means in zip(members, chosen, totals, scores, strict=True):
            right = example.gold[0]
            if task.loss == "classification":
                loss, count = -means.log_softmax(dim=0)[right], 1
            else:
                loss, count = -total[right], example.target.scored
            row = [float(loss), count, int(means.argmax()), *means.tolist()]
            found[at, : len(row)] += counts * torch.tensor(row, dtype=torch.float64, device=found.device)
    return processes.sum(found).cpu()


def answered(
    generator: Generator,
    examples: Sequence[EncodedExample],
    records: Sequence[Record],
    batch_size: int,
    processes: Processes,
    poll: Callable[[], None],
) -> None:
    """Generate an answer for every example and score it; each process those of its batches."""
    generation = generator.generation
    order = sorted(range(len(examples)), key=lambda at: len(examples[at].prompt))
    members = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    tokens = torch.zeros(len(examples), generation.max_new_tokens, dtype=torch.int64, device=processes.device)
    values: dict[int, dict[str, float]] = {}
    for mine, counts in in_turn(members, processes, poll):
        longest = max(len(examples[at].prompt) for at in mine) + generation.max_new_tokens
        with explaining_memory(f"{len(mine)} sequences of {longest} tokens"):
            answers = generator([examples[at] for at in mine], mine)
        for at, answer in zip(mine, answers, strict=True):
            if counts:
                tokens[at, : len(answer)] = torch.tensor(answer, device=tokens.device) + 1  # 0: none
                source = examples[at].source
                assert source is not None
                values[at] = generation.score(generator.text(answer), source)
    processes.sum(tokens)
    everything = {at: one for part in processes.gather(values) for at, one in part.items()}
    for at, one in enumerate(records):
        one.prediction = generator.text((tokens[at][tokens[at] > 0] - 1).tolist())
        one.metrics = everything[at]


def batches(examples: Sequence[EncodedExample], size: int, layout: Layout) -> Iterator[list[int]]:
    """The positions of examples of like length, so that little is padded; at most `size` rows, or one example."""
    rows = [list(trees_of(example.candidates, layout.share_prefixes).values()) for example in examples]
    longest = [max(tree.size for tree in trees) for trees in rows]
    chosen: list[int] = []
    count = 0
    for at in sorted(range(len(examples)), key=longest.__getitem__):
        of_example = len(set(rows[at]))
        if chosen and count + of_example > size:
            yield chosen
            chosen, count = [], 0
        chosen.append(at)
        count += of_example
    yield chosen
