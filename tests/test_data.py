"""Tokens, what is scored, refusals with the place, and batches."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasc_ds.data import Layout, TrainingSequences, collate
from lorasc_ds.encoded import EncodedExample, ScoredTokens
from lorasc_ds.encoding import Encoder
from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.models import QUICKSTART_BASE
from lorasc_ds.order import Order
from lorasc_ds.tasks import Example, Task


@pytest.fixture(scope="session")
def digits_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(QUICKSTART_BASE)


QUESTIONS = Task("made", "candidates", "lm", {}, headline="accuracy")


def encoder(tokenizer: PreTrainedTokenizerBase, task: Task = QUESTIONS, **options: int | None) -> Encoder:
    settings = {"max_length": None, "model_limit": 128, "vocabulary_size": len(tokenizer)} | options
    return Encoder(tokenizer, task, **settings)


def question(prompt: str = "a b c =", answers: tuple[str, ...] = ("1", "2 3"), gold: int = 0) -> Example:
    return Example("file:7", prompt, tuple(f"{prompt} {answer}" for answer in answers), (gold,))


def test_option_length_is_full_text_less_prompt(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    """MeZO 1.4, with BOS on both sides."""
    (encoded,) = encoder(digits_tokenizer).encode_answers([question()])
    assert [candidate.scored for candidate in encoded.candidates] == [1, 2]
    assert [digits_tokenizer.decode(c.ids) for c in encoded.candidates] == ["<s> a b c = 1", "<s> a b c = 2 3"]


def test_only_spaces_are_stripped_so_that_trailing_newlines_stay(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    example = Example("x", " Is it?\n ", (" Is it?\nYes\n",), (0,))
    (encoded,) = encoder(tokenizer, vocabulary_size=10**6, model_limit=None).encode_answers([example])
    (candidate,) = encoded.candidates
    whole = tokenizer("Is it?\nYes\n")["input_ids"]
    assert list(candidate.ids) == whole
    assert candidate.scored == len(tokenizer("Is it?\nYes\n")["input_ids"]) - len(tokenizer("Is it?\n")["input_ids"])


def test_long_sequences_keep_bos_and_their_end(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    made = encoder(digits_tokenizer, max_length=4)
    (encoded,) = made.encode_answers([question("a b c d e f =", ("1",))])
    assert digits_tokenizer.decode(encoded.target.ids) == "<s> f = 1"
    assert made.truncated == 1


def test_without_max_length_a_long_sequence_is_an_error(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"file:7: 6 tokens, but the model has room for 5: set training.max_length"):
        encoder(digits_tokenizer, model_limit=5).encode_answers([question()][:1])


def test_an_answer_truncated_away_is_an_error(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"file:7: the answer of 5 tokens is truncated away at training.max_length 6"):
        encoder(digits_tokenizer, max_length=6).encode_answers([question(answers=("1 2 3 4 5",))])


def test_an_empty_answer_is_an_error(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="file:7: the answer adds no token"):
        encoder(digits_tokenizer).encode_answers([question(answers=("",))])


@pytest.mark.parametrize(
    ("key", "options"), [("training.max_length", {"max_length": 200}), ("task.block_size", {"block_size": 200})]
)
def test_more_than_the_model_s_positions_is_an_error(
    digits_tokenizer: PreTrainedTokenizerBase, key: str, options: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match=f"{key} is 200, but the model has 128 positions"):
        encoder(digits_tokenizer, **options)


def test_a_token_outside_the_vocabulary_is_an_error(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"file:7: token id 16 is outside the model's vocabulary of 16"):
        encoder(digits_tokenizer, vocabulary_size=16).encode_answers([question("c =", ("1",))])


@pytest.mark.parametrize("dev", [[], [Example("y", "", ("",))]], ids=["no document", "no block of two tokens"])
def test_an_empty_split_is_an_error(digits_tokenizer: PreTrainedTokenizerBase, dev: list[Example]) -> None:
    splits = {"train": [Example("x", "", ("a b c",))], "dev": dev}
    task = Task("made", "documents", "lm", splits, headline="perplexity")
    made = encoder(digits_tokenizer, task, block_size=4, vocabulary_size=40)
    made.end = []
    with pytest.raises(DataError, match="the split dev of task made is empty"):
        made.encode()


def test_blocks_have_their_own_length(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"training\.max_length is 8, but documents are packed into blocks"):
        encoder(digits_tokenizer, block_size=4, max_length=8)


def test_an_answer_needs_something_before_it(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="file:7: nothing stands before the answer"):
        encoder(digits_tokenizer).truncate([5, 6], 2, "file:7")


def test_a_tokenizer_that_closes_every_text_does_not_move_the_answer(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    closing = copy.deepcopy(digits_tokenizer)
    closing._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert closing.decode(closing("a b")["input_ids"]) == "<s> a b </s>"
    (encoded,) = encoder(closing).encode_answers([question()])
    assert [closing.decode(c.ids[-c.scored :]) for c in encoded.candidates] == ["1", "2 3"]
    (block,) = encoder(closing, block_size=8).pack([Example("x", "", ("a b",)), Example("y", "", ("c",))])
    assert closing.decode(block.target.ids) == "<s> a b </s> <s> c </s>"


def test_a_tokenizer_that_opens_with_what_ends_loses_no_token(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    """OPT's </s> is both."""
    opening = copy.deepcopy(digits_tokenizer)
    opening._tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    (encoded,) = encoder(opening).encode_answers([question()])
    assert [opening.decode(c.ids) for c in encoded.candidates] == ["</s> a b c = 1", "</s> a b c = 2 3"]


@pytest.mark.parametrize("pad", [30, 31])
def test_a_pad_token_that_the_model_lacks_is_not_used(digits_tokenizer: PreTrainedTokenizerBase, pad: int) -> None:
    """A tokenizer with an added [PAD] and a model that was not resized for it."""
    padded = copy.deepcopy(digits_tokenizer)
    padded.add_special_tokens({"pad_token": "q" if pad == 30 else "[PAD]"})
    assert padded.pad_token_id == pad
    assert encoder(padded, vocabulary_size=31).pad_id == (30 if pad == 30 else 0)


def test_an_end_of_text_that_the_model_lacks_is_an_error(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    made = encoder(digits_tokenizer, block_size=4)
    made.end = [31]
    with pytest.raises(DataError, match="end-of-text token 31 is outside the model's vocabulary of 31"):
        made.pack([Example("x", "", ("a b",))])


def test_documents_are_packed_with_their_end_as_a_target(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [Example("x", "", ("a b",)), Example("y", "", ("c",)), Example("z", "", ("d e f g",))]
    blocks = encoder(digits_tokenizer, block_size=5).pack(documents)
    assert [digits_tokenizer.decode(block.target.ids) for block in blocks] == [
        "<s> a b </s> <s>",
        "c </s> <s> d e",
        "f g </s>",
    ]
    assert [block.target.scored for block in blocks] == [4, 4, 2]  # all but the first token of a block


def test_padding_is_masked_by_length_and_eos_stays_a_target(digits_tokenizer: PreTrainedTokenizerBase) -> None:
    """The pad token may be the end-of-text token: what is scored does not depend on ids."""
    eos = digits_tokenizer.eos_token_id
    assert digits_tokenizer.pad_token_id is None
    assert encoder(digits_tokenizer).pad_id == 0
    batch = collate([[ScoredTokens((5, 6, eos), 2)], [ScoredTokens((5, 6, 7, 8, eos), 1)]], [0, 0], Layout(eos))
    assert batch.input_ids.tolist() == [[5, 6, eos, eos], [5, 6, 7, 8]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.token_target.tolist() == [6, eos, eos]
    assert batch.token_row.tolist() == [0, 0, 1]
    assert batch.token_position.tolist() == [0, 1, 3]


def test_candidates_with_one_input_share_a_forward_pass() -> None:
    batch = collate([[ScoredTokens((1, 2, answer), 1) for answer in (7, 8, 9)]], [1], Layout(0))
    assert batch.input_ids.tolist() == [[1, 2]]
    assert batch.token_target.tolist() == [7, 8, 9]
    assert batch.token_sequence.tolist() == [0, 1, 2]


def training_data(count: int, **options: int) -> TrainingSequences:
    examples = [EncodedExample(str(i), (ScoredTokens((1, i + 2, 2), 1 + i % 2),), (0,)) for i in range(count)]
    settings = {"micro_batch_size": 2, "layout": Layout(0)} | options
    order = Order(count, seed=settings.pop("seed", 3), batch_size=4)
    return TrainingSequences(examples, order=order, loss="lm", **settings)


def test_every_epoch_sees_every_example_once_in_its_own_order() -> None:
    data = training_data(10)
    assert data.steps_per_epoch == 3
    epochs = [[id for step in range(3 * e, 3 * e + 3) for id in data.step(step).ids] for e in range(2)]
    assert sorted(epochs[0], key=int) == sorted(epochs[1], key=int) == [str(i) for i in range(10)]
    assert epochs[0] != epochs[1]
    assert [len(data.step(step).ids) for step in range(3)] == [4, 4, 2]
    assert data.step(4).ids == training_data(10).step(4).ids
    assert data.step(0).ids != training_data(10, seed=4).step(0).ids


def test_micro_batches_split_the_global_batch_in_order() -> None:
    whole, split = training_data(10, micro_batch_size=4).step(1), training_data(10, micro_batch_size=2).step(1)
    assert whole.ids == split.ids
    assert [micro.first for micro in split.micro_batches] == [0, 2]
    assert whole.normaliser == split.normaliser == sum(1 + int(id) % 2 for id in whole.ids)
    targets = torch.cat([micro.batch.token_target for micro in split.micro_batches])
    assert torch.equal(targets, whole.micro_batches[0].batch.token_target)


def test_processes_take_the_same_micro_batches_in_turn() -> None:
    """As many each, at the end of an epoch too; what fills up there does not count."""
    for step in range(3):
        alone = training_data(10, micro_batch_size=1).step(step)
        shared = [training_data(10, micro_batch_size=1, rank=rank, world_size=3).step(step) for rank in range(3)]
        assert {part.ids for part in shared} == {alone.ids}
        assert {part.normaliser for part in shared} == {alone.normaliser}
        assert len({len(part.micro_batches) for part in shared}) == 1
        in_turn = [part.micro_batches[turn] for turn in range(len(shared[0].micro_batches)) for part in shared]
        counted = [micro for micro in in_turn if micro.counts]
        assert [micro.first for micro in counted] == [micro.first for micro in alone.micro_batches]
        for micro, other in zip(counted, alone.micro_batches, strict=True):
            assert torch.equal(micro.batch.input_ids, other.batch.input_ids)
        assert [micro.counts for micro in in_turn].count(False) == (-len(alone.ids)) % 3
