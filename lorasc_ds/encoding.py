"""From examples to tokens, every row checked before a weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from lorasc_ds.chat import encode_chat
from lorasc_ds.encoded import EncodedExample, Prompt, ScoredTokens
from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.image_encoding import encode_image_text
from lorasc_ds.images import Unreadable
from lorasc_ds.processing import ImageTextProcessor
from lorasc_ds.streaming import EncodedBlocks, EncodedRows
from lorasc_ds.tasks import Example, Task
from lorasc_ds.tasks.streams import Stream


class Encoder:
    """Tokenises a task and checks every row before a weight is loaded.

    Args:
        max_length: longest sequence (`training.max_length`); longer ones are cut as the task says, but keep their
            first special token. None: the task's, or the model's limit, and longer than that is an error.
        model_limit: positions of the model, or None.
        vocabulary_size: rows of the model's embedding.
        block_size: tokens in a packed sequence of a `documents` task, else None.
        processor: of a vision-language model; None: the model reads text alone.

    Raises:
        ConfigError: a length is more than the model allows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        max_length: int | None,
        model_limit: int | None,
        vocabulary_size: int,
        block_size: int | None = None,
        processor: ImageTextProcessor | None = None,
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
        self.task = task
        self.end = [] if tokenizer.eos_token_id is None else [single_id(tokenizer.eos_token_id)]
        self.cuts = max_length is not None or task.max_length is not None
        limits = [limit for limit in (max_length or task.max_length, model_limit) if limit is not None]
        self.limit = min(limits, default=None)
        if task.generation is not None:
            self.limit = self.room(self.limit, task.generation.max_new_tokens)
        self.vocabulary_size = vocabulary_size
        self.block_size = block_size or 0
        self.processor = processor
        self.truncated = 0
        self.shots_left_out = 0
        self.left_out = 0  # rows of which the limit leaves nothing that is scored
        self.unreadable: list[Unreadable] = []  # why rows are left out
        # Some tokenizers close every text by themselves; whether a text ends is said here alone.
        probe = self.encode_texts(["a"])[0]  # not the empty text, which is all but what may open a text
        self.closes_texts = bool(self.end) and len(probe) > 1 and probe[-1:] == self.end

    def room(self, limit: int | None, max_new_tokens: int) -> int | None:
        """What an answer of so many tokens leaves of `limit`, in training too, as MeZO has it."""
        if limit is not None and limit <= max_new_tokens + 1:
            raise ConfigError(
                f"task {self.task.name} generates up to {max_new_tokens} tokens, but a sequence may have only {limit}:"
                " raise training.max_length, or take a model with more positions"
            )
        return None if limit is None else limit - max_new_tokens

    @property
    def pad_id(self) -> int:
        """Fills a batch up. Which token it is does not matter, padding is masked by length, if the model has it."""
        own = 0 if self.tokenizer.pad_token_id is None else single_id(self.tokenizer.pad_token_id)
        return own if own < self.vocabulary_size else 0

    @property
    def pixels(self) -> ImageTextProcessor | None:
        """Of the images of the task's rows; None where they have none."""
        images = any(example.images for examples in self.task.splits.values() for example in examples[:1])
        return self.processor if images else None

    def unreadable_lines(self) -> tuple[str, ...]:
        """Which rows are left out for their images, and why."""
        return tuple(f"a row is left out: {error}" for error in self.unreadable)

    def encode_texts(self, texts: list[str], special: bool = True) -> list[list[int]]:
        """Token ids of every text; the tokenizer adds its special tokens, or none."""
        if not texts:  # which is more than transformers 5.23 can take
            return []
        return cast(list[list[int]], self.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"])

    def without_end(self, ids: list[int]) -> list[int]:
        """Without the end of text that the tokenizer adds by itself."""
        return ids[:-1] if self.closes_texts and ids[-1:] == self.end else ids

    def encode(self) -> dict[str, Sequence[EncodedExample]]:
        """Every split of the task.

        Raises:
            DataError: an answer is cut away or a sequence too long, a token id is not in the model's
                vocabulary, or a split is empty.
        """
        encoded = {}
        for split, examples in self.task.splits.items():
            encoded[split] = self.encode_examples(examples) if examples else []
            if not encoded[split]:
                raise DataError(f"the split {split} of task {self.task.name} is empty: more data is needed")
        return encoded

    def encode_examples(self, examples: Sequence[Example]) -> Sequence[EncodedExample]:
        if isinstance(examples, Stream):
            if self.task.kind == "documents":
                return EncodedBlocks(self, examples)
            return EncodedRows(self.encode_examples, examples, self.pad_id)
        match self.task.kind:
            case "documents":
                return self.pack(examples)
            case "sequences":
                return self.encode_sequences(examples)
            case "generation" if self.task.ends:
                return encode_image_text(self, examples)
            case _:
                return self.encode_answers(examples)

    def tokens(self, texts: Iterable[tuple[str, str]]) -> dict[str, list[int]]:
        """Token ids by text; `texts` yields (text, id of the example it is from) and may repeat itself."""
        origins = dict(texts)
        ids = list(map(self.without_end, self.encode_texts(list(origins))))
        for where, of_text in zip(origins.values(), ids, strict=True):
            self.check_vocabulary(of_text, where)
        return dict(zip(origins, ids, strict=True))

    def check_vocabulary(self, ids: Sequence[int], where: str) -> None:
        if max(ids, default=0) >= self.vocabulary_size:
            raise DataError(
                f"{where}: token id {max(ids)} is outside the model's vocabulary of {self.vocabulary_size}: the"
                " tokenizer belongs to another model"
            )

    def encode_answers(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Prompts with candidates. An answer's length is that of the full text less that of the prompt."""
        texts = [(text, e.id) for e in examples if e.texts for text in (e.prompt, *e.texts)]
        tokens = self.tokens((form, where) for text, where in texts for form in (text.strip(" "), trimmed(text)))
        prompts = self.prompts(examples) if self.task.generation else [Prompt()] * len(examples)
        encoded = []
        for example, prompt in zip(examples, prompts, strict=True):
            candidates, cut = [], prompt.cut
            for text in example.texts:
                scored = len(tokens[text.strip(" ")]) - len(tokens[example.prompt.strip(" ")])
                candidates.append(self.truncate(tokens[trimmed(text)], scored, example.id))
                cut = max(cut, len(tokens[trimmed(text)]) - len(candidates[-1].ids))
            encoded.append(
                EncodedExample(
                    example.id,
                    tuple(candidates),
                    example.gold,
                    prompt=prompt.ids,
                    source=example if self.task.generation else None,
                    group=example.group,
                    cut=cut,
                    shots_left_out=prompt.shots_left_out,
                )
            )
        return encoded

    def prompts(self, examples: Sequence[Example]) -> list[Prompt]:
        """What an answer is generated from: as many shots as fit, the last ones are left out first."""
        assert self.task.generation is not None
        room = min((n for n in (self.task.generation.max_length, self.limit) if n is not None), default=None)

        def text(example: Example, shots: int) -> str:
            return example.header + "".join(example.shots[:shots]) + example.prompt

        whole = self.tokens((text(example, len(example.shots)), example.id) for example in examples)
        prompts = []
        for example in examples:
            shots = len(example.shots)
            ids = whole[text(example, shots)]
            while room is not None and len(ids) > room and shots:
                shots -= 1
                ids = self.tokens([(text(example, shots), example.id)])[text(example, shots)]
            self.shots_left_out += len(example.shots) - shots
            cut = max(0, len(ids) - room) if room is not None else 0
            if not ids:
                raise DataError(f"{example.id}: its prompt has no token; give the row a prompt")
            if cut:
                self.truncated += 1
                ids = self.cut(ids, len(ids) - cut)
            prompts.append(Prompt(tuple(ids), cut, len(example.shots) - shots))
        return prompts

    def encode_sequences(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Rows by themselves, of which the whole or the answer is scored, without those that lost it to the limit."""
        masks = self.task.mask_prompt
        plain = [example for example in examples if not example.messages]
        texts = ((text, e.id) for e in plain for text in ((e.prompt, e.texts[0]) if masks else e.texts[:1]))
        tokens = self.tokens(texts)

        def scored_tokens(example: Example) -> tuple[list[int], list[bool]]:
            if example.messages:
                return encode_chat(self.tokenizer, example, masks)
            ids = tokens[example.texts[0]]
            unscored = len(tokens[example.prompt]) if masks else 0
            return ids, [at >= unscored for at in range(len(ids))]

        encoded = (self.sequence(example, *scored_tokens(example)) for example in examples)
        return [example for example in encoded if example is not None]

    def sequence(self, example: Example, ids: list[int], scored: list[bool]) -> EncodedExample | None:
        """A row cut to length, or closed by the end-of-text token where it fits; None: nothing scored is left.

        Args:
            scored: of every token, whether it is; of the first it does not matter.
        """
        where, ends = example.id, self.task.ends and not example.messages
        if ends and self.end and ids[-1:] != self.end and (self.limit is None or len(ids) < self.limit):
            ids, scored = [*ids, *self.end], [*scored, True]
        self.check_vocabulary(ids, where)
        cut = 0 if self.limit is None else max(0, len(ids) - self.limit)
        if cut:
            self.refuse_unless_cut(len(ids), where)
            ids, scored = ids[: self.limit], scored[: self.limit]
        positions = tuple(at for at in range(1, len(ids)) if scored[at])
        if not positions and cut:
            self.left_out += 1
            return None
        if not positions:
            raise DataError(f"{where}: nothing of its {len(ids)} tokens is scored; give the row an answer")
        at_end = positions == tuple(range(len(ids) - len(positions), len(ids)))
        tokens = ScoredTokens(tuple(ids), len(positions), None if at_end else positions)
        return EncodedExample(where, (tokens,), (0,), group=example.group, cut=cut)

    def truncate(self, ids: list[int], scored: int, where: str) -> ScoredTokens:
        """Keep the first special token and the end, so that the answer stays."""
        if scored < 1:
            raise DataError(f"{where}: the answer adds no token to the prompt; give it some text of its own")
        if scored >= len(ids):
            raise DataError(f"{where}: nothing stands before the answer; give the row a prompt")
        if self.limit is None or len(ids) <= self.limit:
            return ScoredTokens(tuple(ids), scored)
        self.refuse_unless_cut(len(ids), where)
        if scored > self.limit - 2:
            raise DataError(
                f"{where}: the answer of {scored} tokens is truncated away at training.max_length {self.limit}:"
                " raise it"
            )
        return ScoredTokens(tuple(self.cut(ids, self.limit)), scored)

    def refuse_unless_cut(self, length: int, where: str) -> None:
        if not self.cuts:
            raise DataError(
                f"{where}: {length} tokens, but the model has room for {self.limit}: set training.max_length to cut"
                f" sequences at their {self.task.cut}, or shorten the row"
            )
        self.truncated += 1

    def cut(self, ids: list[int], length: int) -> list[int]:
        """The last tokens, and the first special token."""
        head = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return [*head, *ids[len(ids) - length + len(head) :]]

    def pack(self, documents: Sequence[Example]) -> list[EncodedExample]:
        """Documents end to end, each closed by the end-of-text token, cut into blocks; those of every group apart."""
        tokens = self.documents(documents)
        blocks: list[EncodedExample] = []
        for group in dict.fromkeys(document.group for document in documents):
            stream = [
                id
                for of_one, document in zip(tokens, documents, strict=True)
                if document.group == group
                for id in of_one
            ]
            starts = range(0, len(stream) - 1, self.block_size)
            blocks += [
                self.block(stream[at : at + self.block_size], number, group)
                for number, at in enumerate(starts, start=1)
            ]
        return blocks

    def documents(self, documents: Sequence[Example]) -> list[list[int]]:
        """The tokens of every document, closed by the end-of-text token."""
        if self.end and self.end[0] >= self.vocabulary_size:
            raise DataError(
                f"the tokenizer's end-of-text token {self.end[0]} is outside the model's vocabulary of"
                f" {self.vocabulary_size}: the tokenizer belongs to another model"
            )
        tokens = self.tokens((document.texts[0], document.id) for document in documents)
        return [[*tokens[document.texts[0]], *self.end] for document in documents]

    def block(self, ids: Sequence[int], number: int, group: str) -> EncodedExample:
        """Block `number`, from 1, of a group: every token but the first is scored."""
        name = f"{group} block {number}".strip()
        return EncodedExample(name, (ScoredTokens(tuple(ids), len(ids) - 1),), (0,), group=group)


def single_id(id: int | list[int] | Any) -> int:
    """A special token's id; where a tokenizer lists several, the first."""
    return int(id[0]) if isinstance(id, list) else int(id)


def trimmed(text: str) -> str:
    """The form in which a full text is trained on: as MeZO strips it."""
    return text.lstrip().strip(" ")
