"""From tokens to tensors: a batch of scored sequences, and the batches of every optimizer step.

The model reads all but the last token of a sequence, so two candidates that differ in their last token
alone share one forward pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasc_ds.encoding import EncodedExample, ScoredTokens


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences as tensors.

    Args:
        input_ids: (inputs, length), padded at the end.
        attention_mask: (inputs, length), or None where nothing is padded.
        token_input, token_position: (tokens,): where the logits of each scored token are.
        token_target: (tokens,): the id of each scored token.
        token_sequence: (tokens,): which sequence it belongs to.
        candidates: sequences of each example; they follow one another.
        gold: the right candidate of each example.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    token_input: Tensor
    token_position: Tensor
    token_target: Tensor
    token_sequence: Tensor
    candidates: tuple[int, ...]
    gold: tuple[int, ...]

    @property
    def scored_tokens(self) -> int:
        return len(self.token_target)

    @property
    def input_tokens(self) -> int:
        """Tokens the model reads, padding not counted."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def last_scored(self, count: int) -> Batch:
        """The same inputs, of which only the last `count` scored tokens are scored."""
        return replace(
            self,
            token_input=self.token_input[-count:],
            token_position=self.token_position[-count:],
            token_target=self.token_target[-count:],
            token_sequence=self.token_sequence[-count:],
        )

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
            token_input=self.token_input.to(device),
            token_position=self.token_position.to(device),
            token_target=self.token_target.to(device),
            token_sequence=self.token_sequence.to(device),
        )


def collate(examples: Sequence[Sequence[ScoredTokens]], gold: Sequence[int], pad_id: int) -> Batch:
    """Examples, each a list of candidates, as one batch. Candidates with the same input share a row."""
    rows: dict[tuple[int, ...], int] = {}
    where: list[tuple[int, int, int, int]] = []
    sequences = [sequence for candidates in examples for sequence in candidates]
    for number, sequence in enumerate(sequences):
        inputs, end = sequence.ids[:-1], len(sequence.ids)
        row = rows.setdefault(inputs, len(rows))
        where += [(row, at - 1, sequence.ids[at], number) for at in range(end - sequence.scored, end)]
    length = max(len(row) for row in rows)
    lengths = torch.tensor([len(row) for row in rows])
    token_input, token_position, token_target, token_sequence = torch.tensor(where).unbind(dim=1)
    return Batch(
        input_ids=torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows]),
        attention_mask=None if (lengths == length).all() else (torch.arange(length) < lengths[:, None]).long(),
        token_input=token_input,
        token_position=token_position,
        token_target=token_target,
        token_sequence=token_sequence,
        candidates=tuple(len(candidates) for candidates in examples),
        gold=tuple(gold),
    )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A forward pass of an optimizer step.

    Args:
        first: index of its first example in the global batch.
        counts: False where it only keeps this process in step with the others, and adds nothing.
    """

    first: int
    batch: Batch
    counts: bool = True


@dataclass(frozen=True, slots=True)
class StepBatch:
    """This process's part of the global batch of an optimizer step.

    Args:
        ids: of all examples of the global batch.
        micro_batches: as many as every other process has.
        normaliser: what the loss, summed over all processes, is divided by: the scored tokens of the global batch (lm)
            or its examples (classification).
    """

    ids: tuple[str, ...]
    micro_batches: tuple[MicroBatch, ...]
    normaliser: int


def derived_seed(*parts: int) -> int:
    """A 63-bit seed that depends on all parts, the same on every machine."""
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


class TrainingData:
    """The batches of a run as a pure function of the optimizer step: every epoch in its own order.

    The last batch of an epoch may be smaller; no example is left out or seen twice. A global batch is cut
    into the same micro batches whatever the number of processes, which take them in turn.
    """

    def __init__(
        self,
        examples: Sequence[EncodedExample],
        *,
        loss: str,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        pad_id: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.examples = examples
        self.loss = loss
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.pad_id = pad_id
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = math.ceil(len(examples) / batch_size)
        self.orders: dict[int, list[int]] = {}

    def order(self, epoch: int) -> list[int]:
        """The examples of an epoch in its own order; that of the epoch under way is kept, not drawn at every step."""
        if epoch not in self.orders:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
            self.orders = {epoch: torch.randperm(len(self.examples), generator=generator).tolist()}
        return self.orders[epoch]

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        if self.loss == "lm":
            return collate([[example.target] for example in examples], [0] * len(examples), self.pad_id)
        return collate([e.candidates for e in examples], [e.gold[0] for e in examples], self.pad_id)

    def step(self, step: int) -> StepBatch:
        """The global batch of optimizer step `step`, counted from 0 over the run."""
        epoch, index = divmod(step, self.steps_per_epoch)
        chosen = self.order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        size = self.micro_batch_size

        def micro_batch(number: int) -> MicroBatch:
            first = number * size
            counts = first < len(chosen)
            first = first if counts else 0  # the end of an epoch: nothing is left for this process
            return MicroBatch(first, self.collate([self.examples[i] for i in chosen[first : first + size]]), counts)

        rounds = math.ceil(len(chosen) / (size * self.world_size))
        tokens = sum(self.examples[i].target.scored for i in chosen)
        return StepBatch(
            ids=tuple(self.examples[i].id for i in chosen),
            micro_batches=tuple(micro_batch(turn * self.world_size + self.rank) for turn in range(rounds)),
            normaliser=tokens if self.loss == "lm" else len(chosen),
        )
