"""From examples to tokens, every row checked before a weight is loaded.

A sequence of tokens is scored on its last `scored` tokens, given all before them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

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
    def inputs(self) -> int:
        """Forward passes that score all candidates: those that differ in their last token alone share one."""
        return len({candidate.ids[:-1] for candidate in self.candidates})

    @property
    def target(self) -> ScoredTokens:
        """The right answer, which language modelling trains on."""
        return self.candidates[self.gold[0]]


def digest_of(examples: Iterable[EncodedExample]) -> str:
    """sha256 over examples in their order: ids, tokens, what is scored and what is right."""
    total = hashlib.sha256()
    for example in examples:
        lengths = [number for candidate in example.candidates for number in (len(candidate.ids), candidate.scored)]
        numbers = array("q", [*lengths, -1, *example.gold, -1])
        for candidate in example.candidates:
            numbers.extend(candidate.ids)
        total.update(example.id.encode() + b"\0" + numbers.tobytes())
    return total.hexdigest()


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
        if block_size is not None and max_length is not None:
            raise ConfigError(
                f"training.max_length is {max_length}, but documents are packed into blocks of task.block_size"
                f" {block_size}: leave max_length out"
            )
        self.tokenizer = tokenizer
        self.end = [] if tokenizer.eos_token_id is None else [single_id(tokenizer.eos_token_id)]
        self.max_length = max_length
        self.limit = max_length or model_limit
        self.vocabulary_size = vocabulary_size
        self.block_size = block_size
        self.truncated = 0
        # Some tokenizers close every text by themselves; whether a text ends is said here alone.
        self.closes_texts = bool(self.end) and self.encode_texts([""])[0][-1:] == self.end

    @property
    def pad_id(self) -> int:
        """Fills a batch up. Which token it is does not matter, padding is masked by length, if the model has it."""
        own = 0 if self.tokenizer.pad_token_id is None else single_id(self.tokenizer.pad_token_id)
        return own if own < self.vocabulary_size else 0

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        return cast(list[list[int]], self.tokenizer(texts, verbose=False)["input_ids"])

    def encode(self, task: Task) -> dict[str, list[EncodedExample]]:
        """Every split of the task.

        Raises:
            DataError: an answer is cut away or a sequence too long, a token id is not in the model's
                vocabulary, or a split is empty.
        """
        encode_split = self.pack if task.kind == "documents" else self.encode_each
        encoded = {}
        for split, examples in task.splits.items():
            encoded[split] = encode_split(examples) if examples else []
            if not encoded[split]:
                raise DataError(f"the split {split} of task {task.name} is empty: more data is needed")
        return encoded

    def tokens(self, texts: Iterable[tuple[str, str]]) -> dict[str, list[int]]:
        """Token ids by text; `texts` yields (text, id of the example it is from) and may repeat itself."""
        origins = dict(texts)
        ids = self.encode_texts(list(origins))
        if self.closes_texts:
            ids = [of_text[:-1] for of_text in ids]
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
        if scored >= len(ids):
            raise DataError(f"{where}: nothing stands before the answer; give the row a prompt")
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
        if self.end and self.end[0] >= self.vocabulary_size:
            raise DataError(
                f"the tokenizer's end-of-text token {self.end[0]} is outside the model's vocabulary of"
                f" {self.vocabulary_size}: the tokenizer belongs to another model"
            )
        tokens = self.tokens((document.texts[0], document.id) for document in documents)
        stream = [id for document in documents for id in (*tokens[document.texts[0]], *self.end)]
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
