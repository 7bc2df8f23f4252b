"""From examples to tensors: tokens, what of them is scored, and the batches of every optimizer step.

A sequence of tokens is scored on its last `scored` tokens, given all before them. The model reads all but
the last token, so two candidates that differ in their last token alone share one forward pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.tasks import Example, Task


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Token ids, of which the last `scored` are predicted."""

    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example as tokens, once per candidate; `gold` as in `Example`."""

    id: str
    candidates: tuple[ScoredTokens, ...]
    gold: tuple[int, ...]

    @property
    def target(self) -> ScoredTokens:
        """The right answer, which language modelling trains on."""
        return self.candidates[self.gold[0]]


class Encoder:
    """Tokenises a task and checks every row before a weight is loaded.

    Args:
        max_length: longest sequence; longer ones keep their first special token and their end. None: the
            model's own limit, and longer is an error.
        model_limit: positions of the model, or None.
        vocabulary_size: rows of the model's embedding.
        block_size: tokens in a packed sequence of a `documents` task, else None.

    Raises:
        ConfigError: a length is more than the model allows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None,
        model_limit: int | None,
        vocabulary_size: int,
        block_size: int | None = None,
    ) -> None:
        for key, length in (("training.max_length", max_length), ("task.block_size", block_size)):
            if length is not None and model_limit is not None and length > model_limit:
                raise ConfigError(f"{key} is {length}, but the model has {model_limit} positions: lower it")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.limit = max_length or model_limit
        self.vocabulary_size = vocabulary_size
        self.block_size = block_size
        self.truncated = 0

    @property
    def pad_id(self) -> int:
        """Fills a batch up. Which token it is does not matter: padding is masked by length."""
        return 0 if self.tokenizer.pad_token_id is None else single_id(self.tokenizer.pad_token_id)

    def encode(self, task: Task) -> dict[str, list[EncodedExample]]:
        """Every split of the task.

        Raises:
            DataError: an answer is cut away or a sequence too long, a token id is not in the model's
                vocabulary, or a split is empty.
        """
        encode_split = self.pack if task.kind == "documents" else self.encode_each
        encoded = {}
        for split, examples in task.splits.items():
            if not examples:
                raise DataError(f"the split {split} of task {task.name} is empty: more data is needed")
            encoded[split] = encode_split(examples)
        return encoded

    def tokens(self, texts: Iterable[tuple[str, str]]) -> dict[str, list[int]]:
        """Token ids by text; `texts` yields (text, id of the example it is from) and may repeat itself."""
        origins = dict(texts)
        ids: list[list[int]] = self.tokenizer(list(origins), verbose=False)["input_ids"]  # type: ignore[assignment]
        for where, of_text in zip(origins.values(), ids, strict=True):
            if of_text and max(of_text) >= self.vocabulary_size:
                raise DataError(
                    f"{where}: token id {max(of_text)} is outside the model's vocabulary of {self.vocabulary_size}:"
                    " the tokenizer belongs to another model"
                )
        return dict(zip(origins, ids, strict=True))

    def encode_each(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Prompts with candidates. An answer's length is that of the full text less that of the prompt."""
        texts = [(text, example.id) for example in examples for text in (example.prompt, *example.texts)]
        tokens = self.tokens((form, where) for text, where in texts for form in (text.strip(" "), trimmed(text)))
        encoded = []
        for example in examples:
            prompt_length = len(tokens[example.prompt.strip(" ")])
            candidates = tuple(
                self.truncate(tokens[trimmed(text)], len(tokens[text.strip(" ")]) - prompt_length, example.id)
                for text in example.texts
            )
            encoded.append(EncodedExample(example.id, candidates, example.gold))
        return encoded

    def truncate(self, ids: list[int], scored: int, where: str) -> ScoredTokens:
        """Keep the first special token and the end, so that the answer stays."""
        if scored < 1:
            raise DataError(f"{where}: the answer adds no token to the prompt; give it some text of its own")
        if self.limit is None or len(ids) <= self.limit:
            return ScoredTokens(tuple(ids), scored)
        if self.max_length is None:
            raise DataError(
                f"{where}: {len(ids)} tokens, but the model has {self.limit} positions:"
                " set training.max_length to cut sequences at their beginning, or shorten the row"
            )
        if scored > self.limit - 2:
            raise DataError(
                f"{where}: the answer of {scored} tokens is truncated away at training.max_length {self.limit}:"
                " raise it"
            )
        self.truncated += 1
        head = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return ScoredTokens((*head, *ids[len(ids) - self.limit + len(head) :]), scored)

    def pack(self, documents: Sequence[Example]) -> list[EncodedExample]:
        """Documents end to end, each closed by the end-of-text token, cut into blocks."""
        assert self.block_size is not None
        end = [] if self.tokenizer.eos_token_id is None else [single_id(self.tokenizer.eos_token_id)]
        tokens = self.tokens((document.texts[0], document.id) for document in documents)
        stream = [id for document in documents for id in (*tokens[document.texts[0]], *end)]
        blocks = [stream[at : at + self.block_size] for at in range(0, len(stream), self.block_size)]
        return [
            EncodedExample(f"block {number}", (ScoredTokens(tuple(block), len(block) - 1),), (0,))
            for number, block in enumerate(blocks, start=1)
            if len(block) > 1
        ]


def single_id(id: int | list[int] | Any) -> int:
    """A special token's id; where a tokenizer lists several, the first."""
    return int(id[0]) if isinstance(id, list) else int(id)


def trimmed(text: str) -> str:
    """The form in which a full text is trained on: as MeZO strips it."""
    return text.lstrip().strip(" ")


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
    """A forward pass of an optimizer step; `first` is the index of its first example in the global batch."""

    first: int
    batch: Batch


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The global batch of an optimizer step.

    `normaliser` is what the summed loss is divided by: its scored tokens (lm) or examples (classification).
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

    The last batch of an epoch may be smaller; no example is left out or seen twice.
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
    ) -> None:
        self.examples = examples
        self.loss = loss
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.pad_id = pad_id
        self.steps_per_epoch = math.ceil(len(examples) / batch_size)

    def order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        return torch.randperm(len(self.examples), generator=generator).tolist()

    def collate(self, examples: Sequence[EncodedExample]) -> Batch:
        if self.loss == "lm":
            return collate([[example.target] for example in examples], [0] * len(examples), self.pad_id)
        return collate([e.candidates for e in examples], [e.gold[0] for e in examples], self.pad_id)

    def step(self, step: int) -> StepBatch:
        """The global batch of optimizer step `step`, counted from 0 over the run."""
        epoch, index = divmod(step, self.steps_per_epoch)
        chosen = self.order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        micro_batches = tuple(
            MicroBatch(first, self.collate([self.examples[i] for i in chosen[first : first + self.micro_batch_size]]))
            for first in range(0, len(chosen), self.micro_batch_size)
        )
        tokens = sum(micro.batch.scored_tokens for micro in micro_batches)
        return StepBatch(
            ids=tuple(self.examples[i].id for i in chosen),
            micro_batches=micro_batches,
            normaliser=tokens if self.loss == "lm" else len(chosen),
        )
