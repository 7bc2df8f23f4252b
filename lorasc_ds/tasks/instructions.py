"""Tasks `alpaca` and `instructions`: requests with the responses to them, every row a sequence by itself.

The templates are those of MELoRA's scripts, which the paper follows (protocols, section 3), and of Stanford's own
`train.py`; rows with chat messages take the tokenizer's chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from lorasc_ds.errors import ConfigError
from lorasc_ds.tasks.base import Example, Message, Task
from lorasc_ds.tasks.rows import Row, hub_rows, local_file, object_row, parse_json, read_rows
from lorasc_ds.tasks.streams import Stream, find_rows

Template = Literal["alpaca", "stanford", "chat"]

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
    " response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
RESPONSE_BEGINS = {"alpaca": "\n", "stanford": ""}  # what stands between the heading and the response
ALPACA = {  # task.dataset -> the hub's id, and the file of the original release
    "cleaned": ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json"),
    "stanford": ("tatsu-lab/alpaca", "alpaca_data.json"),
}
MELORA_LENGTH = 256  # tokens
MELORA_DEV_EXAMPLES = 2000
FORMS_SEEN = 16  # rows of a stream that tell which forms it has
HELD_OUT = 0.1  # of the rows, where there are too few for MELoRA's number
SPEAKERS = {  # of ShareGPT's files -> role
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def prompt_of(instruction: str, input: str, template: Literal["alpaca", "stanford"]) -> str:
    """What stands before the response. The input may be empty."""
    form = WITH_INPUT if input else WITHOUT_INPUT
    return form.format(instruction=instruction, input=input) + RESPONSE_BEGINS[template]


def messages_of(row: Row) -> tuple[Message, ...]:
    """A chat: `messages` with role and content, or ShareGPT's `conversations` with from and value.

    Raises:
        DataError: a message lacks a field, or the assistant says nothing.
    """
    if "messages" in row.fields:
        messages = [{"role": one.text("role"), "content": one.text("content")} for one in row.rows("messages")]
        key = "messages"
    else:
        turns, names = row.rows("conversations"), list(SPEAKERS)
        roles = [SPEAKERS[names[turn.choice("from", names)]] for turn in turns]
        messages = [{"role": role, "content": turn.text("value")} for role, turn in zip(roles, turns, strict=True)]
        key = "conversations"
    if not any(message["role"] == "assistant" for message in messages):
        row.refuse(key, "with a message of the assistant")
    return tuple(messages)


def example_of(row: Row, template: Template | None, group: str = "") -> Example:
    """A row as an example.

    Args:
        template: None: `chat` for a row with messages, else `alpaca`.
        group: as in `Example`.

    Raises:
        DataError: a field is missing or of another kind.
    """
    chat = "messages" in row.fields or "conversations" in row.fields
    if chat and template in (None, "chat"):
        return Example(row.id, prompt="", messages=messages_of(row), group=group)
    if chat and "instruction" not in row.fields:
        row.refuse("instruction", f"a text for task.template {template} (null or chat: takes messages)")
    instruction, output = row.text("instruction"), row.text("output")
    input = row.text("input") if row.fields.get("input") else ""
    if template == "chat":
        request = f"{instruction}\n\n{input}" if input else instruction
        messages = ({"role": "user", "content": request}, {"role": "assistant", "content": output})
        return Example(row.id, prompt="", messages=messages, group=group)
    prompt = prompt_of(instruction, input, template or "alpaca")
    return Example(row.id, prompt, texts=(prompt + output,), group=group)


def streamed_row(path: Path, line: int, text: str, group: str, *, template: Template | None) -> Example:
    """The example in a line of a .jsonl file."""
    return example_of(object_row(f"{path}:{line}", parse_json(text, path, line)), template, group)


def hold_out(
    examples: Sequence[Example], dev_examples: int | None, seed: int
) -> tuple[Sequence[Example], list[Example], str]:
    """Train and dev examples as `datasets.Dataset.train_test_split(test_size, seed=seed)` splits and orders them.

    Args:
        dev_examples: how many; None: MELoRA's 2000, or a tenth where that would be more than a tenth.

    Returns:
        train, dev, and in words what was done.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    count = len(examples)
    held_out = dev_examples or min(MELORA_DEV_EXAMPLES, max(1, round(HELD_OUT * count)))
    if held_out >= count:
        raise ConfigError(
            f"task.dev_examples {held_out} of {count} rows would be held out, none stays to train on: lower it, or"
            " give task.eval_file"
        )
    train, dev = split_off(examples, held_out, seed)
    tenth = " (a tenth; task.dev_examples)" if dev_examples is None and held_out < MELORA_DEV_EXAMPLES else ""
    return train, dev, f"{held_out} of {count} rows{tenth} are held out, drawn by task.sample_seed {seed}"


def split_off(examples: Sequence[Example], count: int, seed: int) -> tuple[Sequence[Example], list[Example]]:
    """The rest and `count` examples, both in the order in which they are drawn."""
    order = np.random.default_rng(seed).permutation(len(examples))
    if isinstance(examples, Stream):
        return examples.only(order[count:]), list(examples.only(order[:count]))
    rest, drawn = ([examples[at] for at in part] for part in (order[count:], order[:count]))
    return rest, drawn


def sources(
    name: str, dataset: str, data_dir: str | None, revision: str | None, files: Sequence[str]
) -> tuple[str, list[tuple[str, list[Row]]]]:
    """Where the training rows are from, in words, and the rows of every source with its group: of several its path.

    Raises:
        ConfigError: the settings say nothing, or two things.
        DataError: the rows cannot be read.
    """
    if files and data_dir is not None:
        raise ConfigError(f"task.train_file and task.data_dir {data_dir!r} both say where the rows are: leave one out")
    if files:
        rows = [read_rows(Path(file), "task.train_file") for file in files]
        return ", ".join(files), list(zip(files if len(files) > 1 else [""], rows, strict=True))
    if name != "alpaca":
        raise ConfigError(
            f"task.train_file is null, but task {name} needs it: give a .json or .jsonl file of rows with instruction,"
            " input and output, or with messages"
        )
    hub_id, file = ALPACA[dataset]
    if data_dir is None:
        return hub_id, [("", hub_rows(hub_id, None, "train", revision))]
    path = local_file(data_dir, (file,))
    return f"{path}", [("", read_rows(path, "task.data_dir"))]


def instructions(
    *,
    name: Literal["alpaca", "instructions"],
    dataset: Literal["cleaned", "stanford"],
    data_dir: str | None,
    revision: str | None,
    train_file: str | Sequence[str] | None,
    eval_file: str | None,
    test_file: str | None,
    test_share: float | None,
    weights: Sequence[float] | None,
    dev_examples: int | None,
    sample_seed: int,
    template: Template | None,
    mask_prompt: bool,
    streaming: bool,
) -> Task:
    """Requests and responses as a task.

    Splits: `train`, `dev` (`eval_file`, or rows held out) and, with `test_file` or `test_share`, `test`. Which rows are
    held out for `test` does not depend on `dev`.

    Raises:
        ConfigError, DataError: in one line.
    """
    files = [train_file] if isinstance(train_file, str) else list(train_file or ())
    examples: Sequence[Example]
    if streaming:
        names, places = files if len(files) > 1 else [""], [find_rows(Path(file), "task.train_file") for file in files]
        origin, examples = ", ".join(files), Stream(places, names, partial(streamed_row, template=template))
    else:
        origin, found = sources(name, dataset, data_dir, revision, files)
        examples = [example_of(row, template, group) for group, rows in found for row in rows]
    splits: dict[str, Sequence[Example]] = {}
    tested = ""
    if test_share is not None:
        count = len(examples)
        examples, splits["test"] = split_off(examples, max(1, round(test_share * count)), sample_seed)
        tested = f"; of {count} rows {len(splits['test'])} are test (task.test_share {test_share:g}), drawn likewise"
    elif test_file is not None:
        splits["test"] = [example_of(row, template) for row in read_rows(Path(test_file), "task.test_file")]
        tested = f"; test is {test_file}"
    if eval_file is None:
        train, dev, split = hold_out(examples, dev_examples, sample_seed)
    else:
        rows = read_rows(Path(eval_file), "task.eval_file")
        train, dev, split = examples, [example_of(row, template) for row in rows], f"dev is {eval_file}"
    seen = train[:FORMS_SEEN] if streaming else train
    chats = sum(bool(example.messages) for example in seen)
    forms = {"the tokenizer's chat template": chats, f"template {template or 'alpaca'}": len(seen) - chats}
    loss = "the response alone" if mask_prompt else "all tokens, those of the prompt too"
    return Task(
        name=name,
        kind="sequences",
        loss="lm",
        splits={"train": train, "dev": dev} | splits,
        headline="perplexity",
        notes=(
            f"{origin}: {split}{tested}",
            f"{' and '.join(f for f, n in forms.items() if n)}; the loss is on {loss} (task.mask_prompt)",
        ),
        max_length=MELORA_LENGTH if name == "alpaca" else None,
        cut="end",
        ends=True,
        mask_prompt=mask_prompt,
        weights=None if weights is None else dict(zip(files, weights, strict=True)),
    )
