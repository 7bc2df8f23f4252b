"""Instruction tuning: the templates' golden strings, Hugging Face's split, and what is scored, by decoding it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasc_ds.encoded import EncodedExample
from lorasc_ds.encoding import Encoder
from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.preview import marked
from lorasc_ds.task_config import InstructionConfig
from lorasc_ds.tasks import Example, Task, load_task
from lorasc_ds.tasks.instructions import example_of, hold_out, prompt_of
from lorasc_ds.tasks.rows import Row

WITH_INPUT = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 {2}\n\n### Response:\n"
WITHOUT_INPUT = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MARKED_CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and loop.last %}<think>\n\n</think> {% endif %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "A cat?"}, {"role": "assistant", "content": "A dog."})  # fmt: skip


@pytest.fixture
def stories(shared_data: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")


def encoded(tokenizer: PreTrainedTokenizerBase, task: Task, **options: Any) -> list[EncodedExample]:
    settings = {"max_length": None, "model_limit": 512, "vocabulary_size": 60_000} | options
    return list(Encoder(tokenizer, task, **settings).encode()["train"])


def task_of(*examples: Example, mask_prompt: bool = True, max_length: int | None = 256) -> Task:
    splits = {"train": list(examples)}
    return Task("alpaca", "sequences", "lm", splits, "perplexity", max_length=max_length, cut="end", ends=True, mask_prompt=mask_prompt)  # fmt: skip


def row(**fields: Any) -> Row:
    return Row("a.jsonl:1", fields)


def rows_file(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows))
    return str(path)


def test_the_templates_are_those_of_the_scripts() -> None:
    assert prompt_of("Add.", "1 {2}", "alpaca") == WITH_INPUT
    assert prompt_of("Add.", "", "alpaca") == WITHOUT_INPUT
    assert prompt_of("Add.", "1 {2}", "stanford") == WITH_INPUT.removesuffix("\n")
    assert prompt_of("Add.", "", "stanford") == WITHOUT_INPUT.removesuffix("\n")
    for nothing in ({}, {"input": ""}, {"input": None}):
        example = example_of(row(instruction="Add.", output="3", **nothing), None)
        assert (example.prompt, example.texts) == (WITHOUT_INPUT, (WITHOUT_INPUT + "3",))
    example = example_of(row(instruction="Add.", input="1 {2}", output="3", text="all of it"), "stanford", "a")
    assert (example.texts, example.group) == ((WITH_INPUT.removesuffix("\n") + "3",), "a")


@pytest.mark.parametrize(("count", "dev"), [(9229, 2000), (11, 3), (2001, 2000)])
def test_the_rows_held_out_are_those_of_datasets(count: int, dev: int) -> None:
    from datasets import Dataset

    rows = [Example(str(at), "") for at in range(count)]
    expected = Dataset.from_dict({"at": range(count)}).train_test_split(test_size=dev, shuffle=True, seed=42)
    train, held_out, _ = hold_out(rows, dev, 42)
    assert [int(one.id) for one in held_out] == list(expected["test"]["at"])
    assert [int(one.id) for one in train] == list(expected["train"]["at"])


def test_by_default_2000_rows_are_held_out_but_at_most_a_tenth() -> None:
    def held_out(count: int, dev: int | None = None) -> int:
        return len(hold_out([Example("", "")] * count, dev, 42)[1])

    assert [held_out(count) for count in (51_760, 20_000, 9229, 100, 2)] == [2000, 2000, 923, 10, 1]
    assert held_out(51_760, 5) == 5
    with pytest.raises(ConfigError, match=r"task\.dev_examples 3 of 3 rows would be held out, none stays"):
        held_out(3, 3)


@pytest.mark.parametrize(("mask_prompt", "count", "left_out"), [(False, 9229, 0), (True, 1000, 37)])
def test_rows_of_alpaca_are_encoded_as_the_scripts_do(
    shared_data: Path, stories: PreTrainedTokenizerBase, mask_prompt: bool, count: int, left_out: int
) -> None:
    """One concatenation, cut at its end to 256, closed where shorter; a masked prompt is as long as its own tokens."""
    file = shared_data / "alpaca" / "random_9k.json"
    task = load_task(InstructionConfig(name="alpaca", train_file=str(file), mask_prompt=mask_prompt), seed=0)
    assert sum(map(len, task.splits.values())) == 9229
    examples = sorted((e for split in task.splits.values() for e in split), key=lambda e: int(e.id.split(":")[1]))[
        :count
    ]
    encoder = Encoder(stories, replace(task, splits={"train": examples}), max_length=None, model_limit=512, vocabulary_size=512)  # fmt: skip
    found = {one.id: one for one in encoder.encode()["train"]}
    assert (len(found), encoder.left_out) == (count - left_out, left_out)
    closed = cut = 0
    for example, fields in list(zip(examples, json.loads(file.read_text()), strict=False))[:: count // 500]:
        prompt = (WITH_INPUT if fields["input"] else WITHOUT_INPUT).replace("Add.", fields["instruction"])
        prompt = prompt.replace("1 {2}", fields["input"])
        whole, asked = stories(prompt + fields["output"], verbose=False)["input_ids"], stories(prompt)["input_ids"]
        ids = whole[:256] + [2] * (len(whole) < 256)
        scored = range(len(asked) if mask_prompt else 1, len(ids))
        assert (example.id in found) == (len(scored) > 0)
        if scored:
            tokens = found[example.id].target
            assert (list(tokens.ids), list(tokens.targets)) == (ids, list(scored))
            assert found[example.id].cut == max(0, len(whole) - 256)
        closed, cut = closed + (len(whole) < 256), cut + (len(whole) > 256)
    assert min(closed, cut) > 100


def test_a_row_as_long_as_the_limit_is_neither_closed_nor_cut(stories: PreTrainedTokenizerBase) -> None:
    example = example_of(row(instruction="Add.", output="One and one is two."), None)
    length = len(stories(example.texts[0])["input_ids"])
    for limit, ends, cut in ((length - 1, "two", 1), (length, "two.", 0), (length + 1, "two.</s>", 0)):
        (one,) = encoded(stories, task_of(example, max_length=limit))
        assert marked(stories, one.target, None) == f"<s> {WITHOUT_INPUT}[[One and one is {ends}]]"
        assert (one.cut, len(one.target.ids)) == (cut, limit)


def test_a_row_of_which_the_limit_leaves_nothing_scored_is_left_out(stories: PreTrainedTokenizerBase) -> None:
    short, long = (example_of(row(instruction=text, output="Yes."), None) for text in ("Go.", "Go on. " * 100))
    kept = encoded(stories, task_of(replace(short, id="short"), replace(long, id="long")))
    assert [one.id for one in kept] == ["short"]
    with pytest.raises(DataError, match="the split train of task alpaca is empty"):
        encoded(stories, task_of(long))
    with pytest.raises(DataError, match=r"a\.jsonl:1: 599 tokens, but the model has room for 512: set training\.max_length to cut"):  # fmt: skip
        encoded(stories, task_of(long, max_length=None))


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = template
    return tokenizer


LLAMA_2_CHAT = (
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi. [/INST][[ Hello! </s>]]<s>[INST] A cat? [/INST][[ A dog. </s>]]"
)
IM = ("<|im_start|>", "<|im_end|>")
CHATML_CHAT = "{0}system\nBe brief.{1}\n{0}user\nHi.{1}\n{0}assistant\n[[Hello!{1}\n]]{0}user\nA cat?{1}\n{0}assistant\n[[A dog.{1}\n]]".format(
    *IM
)
ONLY_MARKED = "{0}system\nBe brief.{1}\n{0}user\nHi.{1}\n{0}assistant\n[[Hello!{1}]]\n{0}user\nA cat?{1}\n{0}assistant\n[[A dog.{1}]]\n".format(
    *IM
)


@pytest.mark.parametrize("name", ["stories260K", "gpt2"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHATML, CHATML_CHAT), (MARKED_CHATML, ONLY_MARKED), (LLAMA_2, LLAMA_2_CHAT)],
    ids=["ChatML", "generation marks", "Llama-2"],
)
def test_the_assistant_s_turns_are_scored(shared_data: Path, name: str, template: str, expected: str) -> None:
    folder = "models" if name == "stories260K" else "tokenizers"
    tokenizer = chat_tokenizer(AutoTokenizer.from_pretrained(shared_data / folder / name), template)
    masked, whole = (
        encoded(tokenizer, task_of(Example("a", "", messages=CHAT), mask_prompt=mask))[0].target
        for mask in (True, False)
    )
    if name == "gpt2":
        expected = expected.replace("<s>", "<|endoftext|>").replace("</s>", "<|endoftext|>")
        assert marked(tokenizer, masked, None) == expected
    else:  # whose decoding puts a space between a special token and what follows
        assert marked(tokenizer, masked, None).replace("<s> ", "<s>").lstrip() == expected.lstrip()
    assert whole.ids == masked.ids == tuple(tokenizer.apply_chat_template(list(CHAT))["input_ids"])
    assert list(whole.targets) == list(range(1, len(whole.ids)))
    if template == LLAMA_2 and name == "stories260K":
        assert [whole.ids.count(id) for id in (1, 2)] == [2, 2]  # the template's own, not the tokenizer's besides


def test_a_token_in_which_question_and_answer_meet_is_scored(shared_data: Path) -> None:
    """GPT-2 reads two newlines as one token; the first is the template's."""
    tokenizer = chat_tokenizer(AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2"), CHATML)
    chat = ({"role": "user", "content": "Q"}, {"role": "assistant", "content": "\n\nA"})
    (one,) = encoded(tokenizer, task_of(Example("a", "", messages=chat)))
    assert marked(tokenizer, one.target, None).endswith("assistant[[\n\n\nA<|im_end|>\n]]")


def test_a_chat_is_cut_at_its_end_and_not_closed(stories: PreTrainedTokenizerBase) -> None:
    example = Example("a", "", messages=CHAT)
    (whole,) = encoded(chat_tokenizer(stories, CHATML), task_of(example))
    assert whole.target.ids[-1] != stories.eos_token_id
    (cut,) = encoded(stories, task_of(example, max_length=len(whole.target.ids) - 30))
    assert cut.target.ids == whole.target.ids[:-30]
    assert list(cut.target.targets) == [at for at in whole.target.targets if at < len(cut.target.ids)]
    assert cut.cut == 30


def test_three_ways_to_write_a_chat(stories: PreTrainedTokenizerBase) -> None:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[one["role"]], "value": one["content"]} for one in CHAT]
    expected = Example("a.jsonl:1", "", messages=CHAT)
    assert example_of(row(messages=[dict(one) for one in CHAT]), None) == expected
    assert example_of(row(conversations=turns), "chat") == expected
    fields = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert example_of(row(**fields), "chat").messages == (
        {"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (None, ConfigError, r"task\.template chat, .* model\.name_or_path has none: name a model that has one"),
        (FORGETFUL, ConfigError, r"task\.mask_prompt is true, but a\.jsonl:1: .* message 3 of 5 does not begin or end as in the whole chat"),
        (CHATML + "{% generation %}{% endgeneration %}", DataError, r"a\.jsonl:1: nothing of its \d+ tokens is scored; give the row an answer"),
        ("{{ raise_exception('no system,\nplease') }}", DataError, r"^a\.jsonl:1: the tokenizer's chat template refuses the messages \(no system, please\); mend the row$"),
    ],
    ids=["none", "forgetful", "marks nothing", "refuses"],
)  # fmt: skip
def test_templates_that_cannot_be_used(
    stories: PreTrainedTokenizerBase, template: str | None, error: type[Exception], message: str
) -> None:
    example = Example("a.jsonl:1", "", messages=CHAT)
    with pytest.raises(error, match=message):
        encoded(chat_tokenizer(stories, template), task_of(example))
    if template == FORGETFUL:
        (one,) = encoded(stories, task_of(example, mask_prompt=False))
        assert stories.decode(list(one.target.ids)).count("<think>") == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"instruction": "a"}, r"a\.jsonl:2: the row needs field 'output', a text"),
        ({"output": "a", "prompt": "b"}, r"a\.jsonl:2: the row needs field 'instruction', a text.* it has output, prompt"),
        ({"instruction": "a", "output": "b", "input": 3}, r"a\.jsonl:2: .*'input', a text.* got 3"),
        ({"messages": "hello"}, r"a\.jsonl:2: .*'messages', a list of objects, got 'hello'"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"a\.jsonl:2\.messages\[0\]: .*'content', a text"),
        ({"messages": [{"role": "user", "content": "a"}]}, r"a\.jsonl:2: .*'messages', with a message of the assistant"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, r"a\.jsonl:2\.conversations\[0\]: .*'from', one of system, human, .* got 'robot'"),
        ('{"instruction": ', r"a\.jsonl:2: not JSON"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path: Path, bad: Any, message: str) -> None:
    file = rows_file(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}, bad])
    with pytest.raises(DataError, match=message) as caught:
        load_task(InstructionConfig(name="instructions", train_file=file), seed=0)
    assert "\n" not in str(caught.value)


def test_a_template_of_alpaca_needs_rows_of_alpaca(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", [{"messages": [dict(one) for one in CHAT]}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*'instruction', a text for task\.template stanford"):
        load_task(InstructionConfig(name="instructions", train_file=file, template="stanford"), seed=0)


def test_several_files_are_groups_with_shares(tmp_path: Path) -> None:
    one, other, dev = (rows_file(tmp_path / f"{name}.jsonl", [{"instruction": name, "output": "b"}] * 4) for name in ("one", "other", "dev"))  # fmt: skip
    config = InstructionConfig(name="instructions", train_file=(one, other), eval_file=dev, weights=(1.0, 3.0))
    task = load_task(config, seed=0)
    assert [example.group for example in task.splits["train"]] == [one] * 4 + [other] * 4
    assert [example.id for example in task.splits["dev"]] == [f"{dev}:{line}" for line in range(1, 5)]
    assert task.weights == {one: 1, other: 3}
    assert [example.group for example in load_task(InstructionConfig(name="alpaca", train_file=one), 0).splits["train"]] == [""] * 3  # fmt: skip


def test_rows_held_out_for_test_are_not_trained_on_whatever_dev_takes(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", [{"instruction": f"{at}", "output": "b"} for at in range(20)])

    def load(**settings: Any) -> Task:
        return load_task(InstructionConfig(name="instructions", train_file=file, **settings), seed=0)

    task, other = load(test_share=0.2), load(test_share=0.2, dev_examples=7)
    ids = {split: {example.id for example in examples} for split, examples in task.splits.items()}
    assert {split: len(found) for split, found in ids.items()} == {"train": 14, "dev": 2, "test": 4}
    assert len(set.union(*ids.values())) == 20
    assert (len(other.splits["dev"]), other.splits["test"]) == (7, task.splits["test"])
    assert "; of 20 rows 4 are test (task.test_share 0.2)" in task.notes[0]
    apart = load(test_file=file, eval_file=file)
    assert [len(apart.splits[split]) for split in ("train", "dev", "test")] == [20, 20, 20]
    with pytest.raises(ValueError, match=r"task\.test_file 'a' and task\.test_share 0\.2 both say what test is"):
        load(test_file="a", test_share=0.2)


def test_alpaca_is_read_from_the_hub_or_its_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    rows = [row(instruction="a", output=f"{at}") for at in range(20)]
    monkeypatch.setattr(sys.modules[example_of.__module__], "hub_rows", lambda *parts: asked.append(parts) or rows)
    load: Callable[..., Task] = lambda **settings: load_task(InstructionConfig(name="alpaca", **settings), 0)  # noqa: E731
    task = load()
    load(dataset="stanford", revision="main")
    assert asked == [("yahma/alpaca-cleaned", None, "train", None), ("tatsu-lab/alpaca", None, "train", "main")]
    assert [len(task.splits[split]) for split in ("train", "dev")] == [18, 2]
    assert task.notes == (
        "yahma/alpaca-cleaned: 2 of 20 rows (a tenth; task.dev_examples) are held out, drawn by task.sample_seed 42",
        "template alpaca; the loss is on all tokens, those of the prompt too (task.mask_prompt)",
    )
    for name, dataset in (("alpaca_data_cleaned", "cleaned"), ("alpaca_data", "stanford")):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"instruction": dataset, "output": "b"}] * 10))
        task = load(dataset=dataset, data_dir=str(tmp_path))
        assert dataset in task.splits["dev"][0].prompt
    with pytest.raises(ConfigError, match=r"task\.train_file and task\.data_dir .* both say where the rows are"):
        load(train_file="a.jsonl", data_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"task\.train_file is null, but task instructions needs it"):
        load_task(InstructionConfig(name="instructions"), seed=0)
