"""From tokens to tensors: a batch of scored sequences, and the batches of every optimizer step.

The model reads all but the last token of a sequence, so two candidates that differ in their last token
alone share one forward pass.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lorasc_ds.encoded import EncodedExample, ScoredTokens
from lorasc_ds.kernels.attention import Sequences
from lorasc_ds.layout import Layout, Tree, rows_of, trees_of
from lorasc_ds.order import Order
from lorasc_ds.prefetching import on_its_way
from lorasc_ds.streaming import taken
from lorasc_ds.visuals import image_inputs


class Named(Protocol):
    """An example, as text or image."""

    @property
    def id(self) -> str: ...


E = TypeVar("E", bound=Named)
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences as tensors.

    Args:
        input_ids: (rows, length), padded at the end.
        attention_mask: (rows, length); None where nothing is padded, or `segments` says what sees what.
        segments: None, where every row is one sequence; else int64 of (3, rows, length): the position of each token,
            its tree (-1: padding), and its branch there (0: the common part). A token sees those before it that are
            in its own branch or the common part of its tree.
        places: (places,): where a scored token is predicted, each place once, counted through the rows.
        token_place: (tokens,): at which of `places` each scored token is predicted.
        token_target: (tokens,): the id of each scored token.
        token_sequence: (tokens,): which sequence it belongs to.
        candidates: sequences of each example; they follow one another.
        gold: the right candidate of each example.
        input_tokens: what the model reads, padding not counted.
        sequences: where those of a single row begin, if it is attention that keeps them apart.
        images: what the model takes besides, by name: the pixels of all images in the order of the rows, and what tells
            of every token what it is, (rows, length).
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    segments: Tensor | None
    places: Tensor
    token_place: Tensor
    token_target: Tensor
    token_sequence: Tensor
    candidates: tuple[int, ...]
    gold: tuple[int, ...]
    input_tokens: int
    sequences: Sequences | None = None
    images: Mapping[str, Tensor] = field(default_factory=dict)

    unreadable: ClassVar[tuple[str, ...]] = ()
    also_lower: ClassVar[str] = " or training.max_length"

    @property
    def size(self) -> str:
        """In words, for an error."""
        rows, length = self.input_ids.shape
        if self.sequences is not None:
            return f"{len(self.sequences.lengths)} sequences of {length} tokens together"
        return f"{rows} sequences of {length} tokens"

    @property
    def token_row(self) -> Tensor:
        """(tokens,): the row in which each scored token is predicted."""
        return self.places[self.token_place] // self.input_ids.shape[1]

    @property
    def token_position(self) -> Tensor:
        """(tokens,): where in that row."""
        return self.places[self.token_place] % self.input_ids.shape[1]

    @property
    def scored_tokens(self) -> int:
        return len(self.token_target)

    def last_scored(self, count: int) -> Batch:
        """The same inputs, of which only the last `count` scored tokens are scored."""
        needed, token_place = self.token_place[-count:].unique(return_inverse=True)
        return replace(
            self,
            places=self.places[needed],
            token_place=token_place,
            token_target=self.token_target[-count:],
            token_sequence=self.token_sequence[-count:],
        )

    def to(self, device: torch.device) -> Batch:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: on_its_way(one, device) for name, one in held.items() if isinstance(one, Tensor)}
        sequences = self.sequences
        if sequences is not None:
            sequences = sequences._replace(bounds=on_its_way(sequences.bounds, device))
        return replace(
            self,
            **moved,
            sequences=sequences,
            images={name: on_its_way(one, device) for name, one in self.images.items()},
        )


def collate(examples: Sequence[Sequence[ScoredTokens]], gold: Sequence[int], layout: Layout) -> Batch:
    """Examples, each a list of candidates, as one batch. Candidates with the same input share a row."""
    numbers: dict[Tree, int] = {}
    scored: list[tuple[int, int, int, int]] = []  # tree, place in it, target, sequence
    sequence = 0
    for candidates in examples:
        trees = trees_of(candidates, layout.share_prefixes)
        for candidate in candidates:
            inputs = candidate.ids[:-1]
            tree = trees[inputs]
            number, offset = numbers.setdefault(tree, len(numbers)), tree.offset(inputs)
            for at in candidate.targets:
                place = at - 1 if at <= len(tree.common) else at - 1 + offset
                scored.append((number, place, candidate.ids[at], sequence))
            sequence += 1
    found = list(numbers)
    rows = rows_of(found, layout)
    starts = {
        number: (row, start)
        for row, members in enumerate(rows)
        for number, start in zip(members, accumulate((found[n].size for n in members), initial=0), strict=False)
    }
    lengths = torch.tensor([sum(found[number].size for number in members) for members in rows])
    length = int(lengths.max())
    input_ids = torch.full((len(rows), length), layout.pad_id)
    for number, (row, start) in starts.items():
        input_ids[row, start : start + found[number].size] = torch.tensor(found[number].ids)
    segments = None
    if any(len(members) > 1 for members in rows) or any(tree.branches for tree in found):
        segments = torch.tensor([0, -1, 0])[:, None, None].repeat(1, len(rows), length)
        for number, (row, start) in starts.items():
            segments[:, row, start : start + found[number].size] = torch.tensor(found[number].segments(number))
    padded = segments is None and bool((lengths < length).any())
    predicted = [starts[number][0] * length + starts[number][1] + place for number, place, _, _ in scored]
    places = {place: number for number, place in enumerate(dict.fromkeys(predicted))}
    tokens = [(places[place], target, of) for place, (_, _, target, of) in zip(predicted, scored, strict=True)]
    # of a streamed row nothing may be scored
    token_place, token_target, token_sequence = torch.tensor(tokens, dtype=torch.int64).reshape(-1, 3).unbind(dim=1)
    return Batch(
        input_ids=input_ids,
        attention_mask=(torch.arange(length) < lengths[:, None]).long() if padded else None,
        segments=segments,
        places=torch.tensor(list(places), dtype=torch.int64),
        token_place=token_place,
        token_target=token_target,
        token_sequence=token_sequence,
        candidates=tuple(len(candidates) for candidates in examples),
        gold=tuple(gold),
        input_tokens=int(lengths.sum()),
        sequences=Sequences.of(tuple(tree.size for tree in found)) if layout.flattens(found) else None,
        images=image_inputs([found[members[0]].visuals for members in rows], length, layout.pixels),
    )


def batch_for(loss: str, examples: Sequence[EncodedExample], layout: Layout) -> Batch:
    """What a loss is made of: the right answers (`lm`), or all candidates (`classification`)."""
    if loss == "lm":
        return collate([[example.target] for example in examples], [0] * len(examples), layout)
    return collate([e.candidates for e in examples], [e.gold[0] for e in examples], layout)


@dataclass(frozen=True, slots=True)
class MicroBatch(Generic[B]):
    """A forward pass of an optimizer step.

    Args:
        first: index of its first example in the global batch.
        counts: False where it only keeps this process in step with the others, and adds nothing.
    """

    first: int
    batch: B
    counts: bool = True


@dataclass(frozen=True, slots=True)
class StepBatch(Generic[B]):
    """This process's part of the global batch of an optimizer step.

    Args:
        ids: of all examples of the global batch.
        micro_batches: as many as every other process has.
        normaliser: what the loss, summed over all processes, is divided by: the scored tokens of the global batch (lm)
            or its examples (classification).
    """

    ids: tuple[str, ...]
    micro_batches: tuple[MicroBatch[B], ...]
    normaliser: int


class TrainingData(Generic[E, B]):
    """The batches of a run as a pure function of the optimizer step: every epoch in its own order.

    The last batch of an epoch may be smaller. A global batch is cut into the same micro batches whatever the number of
    processes, which take them in turn.

    Args:
        order: of the examples in every epoch.
    """

    def __init__(
        self,
        examples: Sequence[E],
        *,
        order: Order,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.examples = examples
        self.order = order
        self.batch_size = order.batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = math.ceil(len(examples) / order.batch_size)
        self.orders: dict[int, Tensor] = {}

    @abstractmethod
    def collate(self, examples: Sequence[E], step: int, first: int) -> B:
        """A micro batch of optimizer step `step`, whose first example is at `first` in the global batch."""

    @abstractmethod
    def normaliser(self, examples: Sequence[E]) -> int:
        """Of a global batch; see `StepBatch`."""

    def positions(self, step: int) -> list[int]:
        """Of the examples of a step; the order of the epoch under way is kept, not drawn at every step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch not in self.orders:
            self.orders = {epoch: self.order(epoch)}
        return self.orders[epoch][index * self.batch_size : (index + 1) * self.batch_size].tolist()

    def take(self, positions: Sequence[int]) -> list[E]:
        return [self.examples[at] for at in positions]

    def step(self, step: int) -> StepBatch[B]:
        """The global batch of optimizer step `step`, counted from 0 over the run."""
        chosen = self.take(self.positions(step))
        size = self.micro_batch_size

        def micro_batch(number: int) -> MicroBatch[B]:
            first = number * size
            counts = first < len(chosen)
            first = first if counts else 0  # the end of an epoch: nothing is left for this process
            return MicroBatch(first, self.collate(chosen[first : first + size], step, first), counts)

        rounds = math.ceil(len(chosen) / (size * self.world_size))
        return StepBatch(
            ids=tuple(example.id for example in chosen),
            micro_batches=tuple(micro_batch(turn * self.world_size + self.rank) for turn in range(rounds)),
            normaliser=self.normaliser(chosen),
        )


class TrainingSequences(TrainingData[EncodedExample, Batch]):
    """Batches of tokens.

    Args:
        loss: as in `Task`.
    """

    def __init__(
        self,
        examples: Sequence[EncodedExample],
        *,
        order: Order,
        loss: str,
        micro_batch_size: int,
        layout: Layout,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(examples, order=order, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
        self.loss = loss
        self.layout = layout

    def take(self, positions: Sequence[int]) -> list[EncodedExample]:
        return taken(self.examples, positions)

    def collate(self, examples: Sequence[EncodedExample], step: int = 0, first: int = 0) -> Batch:
        return batch_for(self.loss, examples, self.layout)

    def normaliser(self, examples: Sequence[EncodedExample]) -> int:
        if self.loss == "lm":
            return max(1, sum(example.target.scored for example in examples))
        return len(examples)
