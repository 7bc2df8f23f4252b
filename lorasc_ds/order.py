"""In which order an epoch sees the examples: a pure function of the seed and the epoch, so that nothing is to be kept.

Positions are int64 tensors, 8 bytes an example.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasc_ds.errors import ConfigError

MEGA_BATCH = 50  # global batches that are sorted by length together, as Hugging Face's LengthGroupedSampler has it


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that depends on all parts, the same on every machine."""
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def permutation(count: int, *parts: int) -> Tensor:
    """The numbers below `count` in an order drawn by the seed of `parts`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(*parts)))


@dataclass(frozen=True, slots=True)
class Source:
    """Examples that belong together, and how many of an epoch are theirs.

    Args:
        name: their group.
        positions: of its examples among all.
        share: how many examples of an epoch are drawn from it.
    """

    name: str
    positions: Tensor
    share: int

    def __str__(self) -> str:
        count = len(self.positions)
        return f"{self.name}: {self.share} an epoch, {self.share / count:.3g} times its {count}"


@dataclass(frozen=True, slots=True)
class Order:
    """The order of the examples in every epoch, drawn without replacement.

    Args:
        count: examples, and as many an epoch has.
        seed: of all draws.
        sources: where an epoch is to have other shares than there are examples; else none.
        batch_size: global batch.
        lengths: which batches are grouped by; None: they are not.
    """

    count: int
    seed: int
    batch_size: int
    sources: tuple[Source, ...] = ()
    lengths: Tensor | None = None

    def __call__(self, epoch: int) -> Tensor:
        """Positions of the examples of an epoch, (count,)."""
        order = permutation(self.count, self.seed, epoch)
        if self.sources:
            drawn = [self.drawn(number, source, epoch) for number, source in enumerate(self.sources)]
            order = torch.cat(drawn)[order]
        return order if self.lengths is None else grouped_by_length(order, self.lengths, self.batch_size)

    def drawn(self, number: int, source: Source, epoch: int) -> Tensor:
        """The share of source `number` in an epoch: where the epoch before left off, in passes of its own order."""
        count = len(source.positions)
        first, end = epoch * source.share, (epoch + 1) * source.share
        passes = range(first // count, -(-end // count))
        orders = [permutation(count, self.seed, number, one, count) for one in passes]  # four parts: no epoch's seed
        return source.positions[torch.cat(orders)[first - passes.start * count :][: source.share]]


def grouped_by_length(order: Tensor, lengths: Tensor, batch_size: int) -> Tensor:
    """Examples of like length in a batch: every `MEGA_BATCH` batches are sorted by length, the longest first.

    Of few examples a quarter at a time, so that epochs differ. The batch with the very longest comes first of all, so
    that memory which does not suffice shows at once.

    Args:
        order: positions of the examples, shuffled.
        lengths: of the examples by position.
    """
    size = batch_size * max(1, min(len(order) // (4 * batch_size), MEGA_BATCH))
    order = torch.cat([one[lengths[one].argsort(descending=True, stable=True)] for one in order.split(size)])
    start = max(range(0, len(order), size), key=lambda at: int(lengths[order[at]]))  # of equals the first
    count = min(batch_size, len(order) - start)  # the last batch may be smaller: then only so many change places
    first, longest = order[:count].clone(), order[start : start + count].clone()
    order[start : start + count] = first
    order[:count] = longest
    return order


def shares_of(weights: Sequence[float], count: int) -> list[int]:
    """`count` in proportion to the weights, in whole numbers by largest remainder; of equal remainders the first."""
    exact = [count * weight / math.fsum(weights) for weight in weights]
    shares = [math.floor(one) for one in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: shares[at] - exact[at])
    for at in by_remainder[: count - sum(shares)]:
        shares[at] += 1
    return shares


def sources_of(groups: Sequence[str], weights: Mapping[str, float]) -> tuple[Source, ...]:
    """The sources of an epoch that has as many examples as there are.

    Args:
        groups: of every example.
        weights: of every group.

    Raises:
        ConfigError: a source has no example, or its share is none.
    """
    shares = shares_of(list(weights.values()), len(groups))
    sources = []
    for (group, weight), share in zip(weights.items(), shares, strict=True):
        positions = torch.tensor([at for at, one in enumerate(groups) if one == group])
        if not len(positions) or not share:
            raise ConfigError(
                f"task.weights gives {group} {weight:g}, which is {share} of the {len(groups)} examples of an epoch,"
                f" and it has {len(positions)}: change the weights, or leave the file out"
            )
        sources.append(Source(group, positions, share))
    return tuple(sources)
