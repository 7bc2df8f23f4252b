"""What a task's data is like once it is tokens: lengths, what is cut and scored, and what padding costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorasc_ds.data import TrainingSequences
from lorasc_ds.encoded import EncodedExample
from lorasc_ds.layout import Layout, rows_of, trees_of
from lorasc_ds.preview import trained_on

QUANTILES = {"min": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}


def quantile(values: Sequence[int], share: float) -> int:
    """The least of the sorted values that `share` of them do not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def lengths_of(examples: Sequence[EncodedExample]) -> dict[str, list[int]]:
    """Numbers of tokens, by what they are of; nothing that there is none of."""
    candidates = [candidate for example in examples for candidate in example.candidates]
    found = {
        "sequences": [len(candidate.ids) for candidate in candidates],
        "scored": [candidate.scored for candidate in candidates],
        "prompts": [len(example.prompt) for example in examples if example.prompt],
        "cut away": [example.cut for example in examples if example.cut],
    }
    return {name: sorted(numbers) for name, numbers in found.items() if numbers}


def table(rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Cells in columns, the first `texts` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at < texts else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def length_table(splits: Mapping[str, Sequence[EncodedExample]]) -> list[str]:
    """Of every split how many tokens its sequences have, are scored of them, prompts have and the limit cut away."""
    rows = [["split", "tokens of", "count", *QUANTILES]]
    for split, examples in splits.items():
        for name, numbers in lengths_of(examples).items():
            quantiles = [str(quantile(numbers, share)) for share in QUANTILES.values()]
            rows.append([split, name, str(len(numbers)), *quantiles])
    return table(rows, 2)


def split_lines(splits: Mapping[str, Sequence[EncodedExample]], given: Mapping[str, int]) -> Iterator[str]:
    """A line for every split: examples, what is left out, cut and scored.

    Args:
        given: of every split, how many examples the task has.
    """
    for split, examples in splits.items():
        found = lengths_of(examples)
        parts = [f"{len(examples)} examples"]
        if len(examples) < given[split]:
            parts.append(f"{given[split] - len(examples)} left out (the limit leaves nothing scored of them)")
        if "sequences" in found:
            parts.append(f"{sum(found['scored']) / sum(found['sequences']):.1%} of the tokens scored")
        cut = found.get("cut away", [])
        if cut:
            parts.append(f"{len(cut)} truncated by {sum(cut) / len(cut):.1f} tokens on average")
        shots = [example.shots_left_out for example in examples if example.shots_left_out]
        if shots:
            parts.append(f"{sum(shots)} demonstrations left out of {len(shots)} prompts")
        yield f"{split}: {', '.join(parts)}"


@dataclass(frozen=True, slots=True)
class Cost:
    """Of batches: tokens that are no padding, and tokens that the model computes."""

    valid: int
    computed: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.valid + other.valid, self.computed + other.computed)


def cost_of(examples: Sequence[EncodedExample], loss: str, layout: Layout) -> Cost:
    """Of one forward pass, as `data.collate` lays it out."""
    by_example = [trees_of(trained_on(example, loss), layout.share_prefixes).values() for example in examples]
    trees = list(dict.fromkeys(tree for found in by_example for tree in found))
    rows = [sum(trees[number].size for number in members) for members in rows_of(trees, layout)]
    return Cost(sum(rows), len(rows) * max(rows))


def epoch_cost(data: TrainingSequences, order: Sequence[int], layout: Layout) -> Cost:
    """Of all forward passes of an epoch with the examples in this order, over all processes."""
    examples = [data.examples[at] for at in order]
    total = Cost(0, 0)
    for start in range(0, len(examples), data.batch_size):
        batch = examples[start : start + data.batch_size]
        for first in range(0, len(batch), data.micro_batch_size):
            total += cost_of(batch[first : first + data.micro_batch_size], data.loss, layout)
    return total
