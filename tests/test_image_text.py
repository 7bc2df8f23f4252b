"""Questions about images: the rows, and what a vision-language model is given of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from lorasc_ds import models
from lorasc_ds.config import ModelConfig
from lorasc_ds.data import Layout, collate
from lorasc_ds.encoded import EncodedExample, digest_of
from lorasc_ds.encoding import Encoder
from lorasc_ds.errors import ConfigError, DataError
from lorasc_ds.evaluation import check_images
from lorasc_ds.generation import Generator
from lorasc_ds.image_task_config import ImageTextConfig
from lorasc_ds.objectives import token_log_probabilities
from lorasc_ds.processing import processor_of
from lorasc_ds.tasks import Example, Task, load_task
from lorasc_ds.tasks.image_text import score

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows beside `one.png` and `two.png`."""
    Image.new("RGB", (8, 8), "black").save(tmp_path / "one.png")
    Image.new("L", (20, 12), 200).save(tmp_path / "two.png")

    def rows(*of: dict[str, Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in of))
        return path

    return rows


def task_of(file: Path, **settings: Any) -> Task:
    settings = {"eval_file": str(file)} | settings
    return load_task(ImageTextConfig(name="image_text", train_file=str(file), **settings), 0)


def first(file: Path, **settings: Any) -> Example:
    return task_of(file, **settings).splits["train"][0]


def test_a_row_is_a_prompt_with_marked_places(write: Write, tmp_path: Path) -> None:
    file = write({"image": "one.png", "question": " Which {image}? ", "answer": ["a cat", "Cats"]})
    found = first(file)
    assert found.prompt == "<image>\nWhich {image}?\n"
    assert found.texts == ("<image>\nWhich {image}?\na cat",)
    assert found.references == ("a cat", "Cats")
    assert found.messages == (
        {"role": "user", "content": "<image>Which {image}?"},
        {"role": "assistant", "content": "a cat"},
    )
    assert [(one.name, one.read()) for one in found.images] == [("one.png", (tmp_path / "one.png").read_bytes())]
    assert found.id == f"{file}:1"
    own = first(file, template="Q {question} {image} A")
    assert (own.texts, own.messages) == (("Q Which {image}? <image> Aa cat",), ())
    blind = first(file, use_images=False)
    assert (blind.prompt, blind.images) == ("Which {image}?\n", ())
    assert blind.messages[0]["content"] == "Which {image}?"


def test_several_images_captions_and_own_places(write: Write) -> None:
    two = ["one.png", "two.png"]
    assert first(write({"image": two, "question": "Alike?", "answer": "no"})).prompt == "<image><image>\nAlike?\n"
    assert first(write({"image": "two.png", "question": None, "answer": "grey"})).texts == ("<image>\ngrey",)
    assert first(write({"image": "two.png", "answer": "grey"})).messages[0]["content"] == "<image>"
    placed = write({"image": two, "question": "Is <image> like <image> ?", "answer": "no"})
    assert first(placed).prompt == "Is <image> like <image> ?\n"
    assert first(placed, use_images=False).prompt == "Is like ?\n"
    assert len(first(placed).images) == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?", "answer": "no"}, "'image'"),
        ({"image": "one.png", "question": "?"}, "'answer'"),
        ({"image": "one.png", "question": "?", "answer": " "}, "'answer'"),
        ({"image": "one.png", "question": "?", "answer": []}, "'answer'"),
        ({"image": "one.png", "question": "?", "answer": "<image>"}, "'answer'"),
        ({"image": "one.png", "question": 3, "answer": "no"}, "'question'"),
        ({"image": ["one.png", "two.png"], "question": "a <image>?", "answer": "no"}, "'question'"),
        ({"image": "three.png", "question": "?", "answer": "no"}, "paths of files from"),
        ({"image": "../rows.jsonl", "question": "?", "answer": "no"}, "paths that stay in"),
        ({"image": "/etc/passwd", "question": "?", "answer": "no"}, "paths that stay in"),
        ({"image": "link.png", "question": "?", "answer": "no"}, "paths that stay in"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(write: Write, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    (tmp_path / "link.png").symlink_to("/etc/passwd")
    file = write({"image": "one.png", "question": "?", "answer": "no"}, row)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: ") as raised:
        task_of(file)
    assert str(raised.value).startswith(f"{file}:2: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_template_needs_a_place_for_the_image(write: Write) -> None:
    file = write({"image": "one.png", "question": "?", "answer": "no"})
    with pytest.raises(ConfigError, match=r"task\.template is '\{question\}': \{image\} is needed"):
        task_of(file, template="{question}")


def test_splits(write: Write) -> None:
    file = write(*({"image": "one.png", "question": f"{n} ?", "answer": "no"} for n in range(30)))
    task = task_of(file, eval_file=None, test_file=str(file))
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 27, "dev": 3, "test": 30}
    assert {row.id for row in task.splits["train"]}.isdisjoint(row.id for row in task.splits["dev"])
    assert task_of(file, eval_file=None, dev_examples=5).splits["dev"][0] in task.splits["test"]


@pytest.mark.parametrize(
    ("answer", "right", "value"),
    [
        (" The CAT. ", ("cat",), 1.0),
        ("two  cats", ("a dog", "Two cats!"), 1.0),
        ("cats", ("cat",), 0.0),
        ("a", ("A",), 1.0),
        ("B", ("A",), 0.0),
        ("the", ("A",), 0.0),  # of which normalising leaves nothing
        ("", ("A",), 0.0),
    ],
)
def test_exact_match(answer: str, right: tuple[str, ...], value: float) -> None:
    assert score(answer, Example("1", "", references=right)) == {"exact_match": value}


# --- a tiny LLaVA -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(known: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(known / "model").eval()


def encoder_of(known: Path, task: Task, **settings: Any) -> Encoder:
    config = ModelConfig(name_or_path=str(known / "model"))
    shape = models.load_shape(config)
    settings = {"max_length": None, "model_limit": 64, "processor": processor_of(config, shape)} | settings
    return Encoder(models.load_tokenizer(config), task, vocabulary_size=models.vocabulary_size(shape), **settings)


def layout_of(encoder: Encoder) -> Layout:
    return Layout(encoder.pad_id, pixels=encoder.pixels)


def log_probabilities(model: Any, examples: list[EncodedExample], layout: Layout) -> torch.Tensor:
    batch = collate([example.candidates for example in examples], [0] * len(examples), layout)
    with torch.no_grad():
        return token_log_probabilities(model, batch)


def direct(model: Any, processor: Any, example: Example, answer: list[int]) -> torch.Tensor:
    """The log-probabilities of an answer, by transformers alone."""
    images = [Image.open(one.path).convert("RGB") for one in example.images]
    given = processor(images=images, text=example.prompt, return_tensors="pt")
    ids = torch.cat([given.pop("input_ids"), torch.tensor([answer])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=given["pixel_values"]).logits[0, -len(answer) - 1 : -1]
    return logits.float().log_softmax(-1)[range(len(answer)), answer]


def test_scored_tokens_are_those_of_a_direct_forward_pass(known: Path, llava: Any, write: Write) -> None:
    """One at a time and in one batch: rows with other images but the same tokens, two images in a row, and padding."""
    rows = [
        {"image": "one.png", "question": "is it even ?", "answer": "yes"},
        {"image": "two.png", "question": "is it even ?", "answer": "yes"},
        {"image": ["two.png", "one.png"], "question": "which digit ?", "answer": "4"},
        {"image": "one.png", "question": "is it above four ?", "answer": "no yes"},
    ]
    task = task_of(write(*rows))
    encoder = encoder_of(known, task)
    encoded = list(encoder.encode()["train"])
    processor = AutoProcessor.from_pretrained(known / "model")
    expected = []
    for example, one in zip(task.splits["train"], encoded, strict=True):
        answer = [*processor.tokenizer(example.texts[0][len(example.prompt) :])["input_ids"][1:], 1]
        ids = processor(images=[Image.new("RGB", (8, 8))] * len(example.images), text=example.prompt)["input_ids"][0]
        assert one.target.ids == (*ids, *answer)
        assert one.target.scored == len(answer)
        assert one.prompt == tuple(ids)
        expected.append(direct(llava, processor, example, answer))
        assert log_probabilities(llava, [one], layout_of(encoder)) == pytest.approx(expected[-1], abs=1e-5)
    together = log_probabilities(llava, encoded, layout_of(encoder))
    assert together == pytest.approx(torch.cat(expected), abs=1e-5)
    assert (together[0] - together[2]).abs() > 1e-2, "the images make no difference"


def test_generation_is_that_of_each_row_alone(known: Path, llava: Any, write: Write) -> None:
    """Prompts of other lengths and numbers of images, padded at their beginning."""
    rows = [
        {"image": "one.png", "question": "is it even ?", "answer": "yes"},
        {"image": ["two.png", "one.png"], "question": "is it above four ?", "answer": "no"},
        {"image": "two.png", "question": "which digit ?", "answer": "4"},
    ]
    task = task_of(write(*rows), max_new_tokens=6)
    encoder = encoder_of(known, task)
    encoded = list(encoder.encode()["train"])
    assert task.generation is not None
    # what ends an answer is taken away, so that all six tokens are compared
    model = AutoModelForImageTextToText.from_pretrained(known / "model").eval()
    model.generation_config.eos_token_id = None
    encoder.tokenizer.eos_token = None
    generator = Generator(model, encoder.tokenizer, task.generation, layout=layout_of(encoder))
    processor = AutoProcessor.from_pretrained(known / "model")
    answers = generator(encoded, range(len(encoded)))
    for example, answer in zip(task.splits["train"], answers, strict=True):
        images = [Image.open(one.path).convert("RGB") for one in example.images]
        given = processor(images=images, text=example.prompt, return_tensors="pt")
        found = model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
        assert answer == found.tolist()


def test_long_rows_bad_images_and_models_of_text_are_refused(known: Path, write: Write, tmp_path: Path) -> None:
    good = {"image": "one.png", "question": "is it even ?", "answer": "yes"}
    file = write(good)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 11 tokens, but there is room for 8, and a row with images is"):
        encoder_of(known, task_of(file, max_new_tokens=4), max_length=12).encode()
    with pytest.raises(ConfigError, match=r"reads text alone: name a vision-language model"):
        encoder_of(known, task_of(file), processor=None).encode()
    blind = encoder_of(known, task_of(file, use_images=False), processor=None).encode()["train"][0]
    assert (blind.target.scored, blind.visuals) == (2, None)

    (tmp_path / "bad.png").write_bytes((tmp_path / "two.png").read_bytes()[:50])
    task = task_of(write(good, good | {"image": "bad.png"}), eval_file=str(write(good, name="dev.jsonl")))
    encoder = encoder_of(known, task)
    assert len(encoder.encode()["train"]) == 1
    assert [
        line.startswith(f"a row is left out: {file}:2: bad.png: damaged") for line in encoder.unreadable_lines()
    ] == [True]
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: bad\.png: damaged .*; mend the image, or set task\.unreadable skip"
    ):
        encoder_of(known, replace(task, unreadable="refuse")).encode()


def test_another_image_is_another_example(known: Path, write: Write, tmp_path: Path) -> None:
    """The digest of the data, which a run is compared by, knows the contents of the files."""
    task = task_of(write({"image": "one.png", "question": "is it even ?", "answer": "yes"}))
    before = digest_of(encoder_of(known, task).encode()["train"])
    assert digest_of(encoder_of(known, task).encode()["train"]) == before
    Image.new("RGB", (8, 8), "white").save(tmp_path / "one.png")
    assert digest_of(encoder_of(known, task).encode()["train"]) != before


CHAT = (
    "{% for m in messages %}{{ m.role }} {% for part in m.content %}{% if part.type == 'image' %}<image> {% else %}"
    "{{ part.text }} {% endif %}{% endfor %}{% if m.role == 'assistant' %}CLOSED{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.mark.parametrize(("template", "scored"), [(CHAT.replace("CLOSED", ""), "yes</s>"), (CHAT.replace("CLOSED", " </s>"), "yes</s>"), (CHAT.replace("CLOSED", "no"), "yesno")])  # fmt: skip
def test_the_processor_s_chat_template_is_taken(known: Path, write: Write, template: str, scored: str) -> None:
    """What it leaves open is closed by the end-of-text token; a template of the task goes before it."""
    file = write({"image": "one.png", "question": "is it even ?", "answer": "yes"})

    def text(task: Task) -> tuple[str, str]:
        encoder = encoder_of(known, task)
        assert encoder.processor is not None
        encoder.processor.processor.chat_template = template
        one = encoder.encode()["train"][0]
        ids, count = list(one.target.ids), one.target.scored
        decode = encoder.tokenizer.decode
        return decode(ids[:-count]).replace(" ", ""), decode(ids[-count:]).replace(" ", "")

    assert text(task_of(file)) == ("<s><unk><image><image><image><image>isiteven?<unk>", scored)
    own = task_of(file, template="{question} {image} ")
    assert text(own) == ("<s>isiteven?<image><image><image><image>", "yes</s>")


def test_a_model_that_looks_ahead_is_refused(
    known: Path, llava: Any, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(write({"image": "one.png", "question": "is it even ?", "answer": "yes"}))
    encoder = encoder_of(known, task)
    (one,) = encoder.encode()["train"]
    batch = collate([one.candidates], [0], layout_of(encoder))
    check_images(llava, batch)
    forward = llava.forward

    def ahead(input_ids: torch.Tensor, **rest: Any) -> Any:
        found = forward(input_ids=input_ids, **rest)
        found.logits += input_ids[:, -1]
        return found

    monkeypatch.setattr(llava, "forward", ahead)
    with pytest.raises(ConfigError, match="lets a token of an answer see those after it"):
        check_images(llava, batch)
