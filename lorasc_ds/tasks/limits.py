"""A part of a split, for a quick look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from lorasc_ds.tasks.base import Example
from lorasc_ds.tasks.images import LabelledImages


def limited(examples: Sequence[Example], limit: int | None) -> Sequence[Example]:
    """The first `limit` examples of every group, images of every class in it; None: all."""
    if limit is None:
        return examples
    if isinstance(examples, LabelledImages):
        return examples.only(first_of_each(zip(examples.groups, examples.labels.tolist(), strict=True), limit))
    return [examples[at] for at in first_of_each((one.group for one in examples), limit)]


def first_of_each(kinds: Iterable[Hashable], limit: int) -> list[int]:
    """The positions of the first `limit` of every kind."""
    seen: Counter[Hashable] = Counter()
    kept = []
    for at, kind in enumerate(kinds):
        seen[kind] += 1
        if seen[kind] <= limit:
            kept.append(at)
    return kept
