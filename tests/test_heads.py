"""The heads of models on images: against direct computations, and wherever a trained one lies, in any order of classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_models
import pytest
import torch
from conftest import RECIPE
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import AutoTokenizer, Dinov2ForImageClassification, SiglipModel

from lorasc_ds.algorithm.ledger import Ledger
from lorasc_ds.class_order import ClassOrder, class_order
from lorasc_ds.classifier import ImageClassifier, SavedHead, classes_of_head, make_rows, prompts_of, read_head
from lorasc_ds.errors import ConfigError
from lorasc_ds.evaluate import main as evaluate
from lorasc_ds.export import main as export
from lorasc_ds.images import Preprocessing
from lorasc_ds.tasks.base import Classes
from lorasc_ds.train import main as train

HOW = Preprocessing(resize=None, crop=(32, 32), resample=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
NAMES, TEMPLATES = ("bus", "cat", "old dog"), ("a photo of a {}.", "the {}.")
PIXELS = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
NORMALISED = (PIXELS / 255 - torch.tensor(HOW.mean)[:, None, None]) / torch.tensor(HOW.std)[:, None, None]
TURNED = [2, 0, 1]  # rows of a head in another order: old dog, bus, cat


def test_the_prototypes_of_siglip_are_those_of_its_own_forward_pass(tmp_path: Path) -> None:
    """One prompt at a time, filled up to the 64 positions and without a mask, as SigLIP learned texts."""
    folder = image_models.siglip(tmp_path)
    model, tokenizer = SiglipModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    classes = Classes(NAMES, TEMPLATES)
    network = ImageClassifier(model, classes, HOW, prompts_of(classes, tokenizer, 64, fill=True)).eval()
    rows = []
    with torch.no_grad():
        for name in NAMES:
            texts = []
            for template in TEMPLATES:
                ids = tokenizer(template.replace("{}", name)).input_ids
                filled = torch.tensor([ids + [tokenizer.pad_token_id] * (64 - len(ids))])
                out = model(input_ids=filled, pixel_values=NORMALISED)
                texts.append(out.text_embeds[0])
            rows.append(functional.normalize(torch.stack(texts).mean(dim=0), dim=0))
        make_rows(network, network)
        expected = model.logit_scale.exp() * out.image_embeds @ torch.stack(rows).T
        torch.testing.assert_close(network(PIXELS), expected, rtol=1e-4, atol=1e-4)


def test_the_classifier_of_dinov2_is_its_own_and_a_trained_one_begins_so(tmp_path: Path) -> None:
    folder = image_models.dinov2(tmp_path, 3)
    for settings in ({}, {"train_head": True}):
        model = Dinov2ForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            expected = model(pixel_values=NORMALISED).logits
            network = ImageClassifier(model, Classes(NAMES, **settings), HOW).eval()
            torch.testing.assert_close(network(PIXELS), expected, rtol=1e-6, atol=1e-6)
            chosen = ImageClassifier(model, Classes(NAMES, subset=(1, 0), outputs=(2, 0, 1)), HOW).eval()
            torch.testing.assert_close(chosen(PIXELS), expected[:, [0, 2]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "length"), [("clip", 77), ("siglip", 64)])
def test_the_prompt_with_the_most_tokens_is_named(kind: str, length: int, tmp_path: Path) -> None:
    """Not that with the most letters; none is cut."""
    tokenizer = AutoTokenizer.from_pretrained(getattr(image_models, kind)(tmp_path))
    long, dense = "a" * 100, "é5" * 40
    most = max(len(tokenizer(f"the {name}.").input_ids) for name in (long, dense))
    assert len(tokenizer(f"the {dense}.").input_ids) == most > length
    with pytest.raises(
        ConfigError, match=f"the prompt 'the {dense}.' has {most} tokens, .* tower's {length}: "
    ) as error:
        prompts_of(Classes((long, dense, "cat"), ("the {}.",)), tokenizer, length, fill=kind == "siglip")
    assert "\n" not in str(error.value)


def test_classes_are_matched_by_name_where_all_are_the_same_else_by_position() -> None:
    assert class_order(("crane", "tennis ball", "crane"), ("crane", "Tennis_ball", "crane")) == ClassOrder()
    assert class_order(NAMES, ("Old_Dog", "bus", "CAT")).outputs == (1, 2, 0)
    order = class_order(NAMES, ("bus", "tabby", "old dog"))
    assert order.outputs is None
    assert order.remark == (
        "the classifier's outputs have other names than the classes, 1 of 3, and are taken by position: output 1,"
        " 'tabby', is class 'cat'"
    )
    assert class_order(("crane", "crane", "cat"), ("cat", "crane", "crane")).outputs is None  # twice the same name
    assert "have no names" in str(class_order(NAMES, ()).remark)
    assert Classes(NAMES, outputs=(1, 2, 0)).by_output == ("old dog", "bus", "cat")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pixels, labels = load_digits(return_X_y=True)
    for at in range(60):
        place = folder / ("train" if at < 32 else "test") / ("bus", "cat", "old_dog")[labels[at] % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels[at].reshape(8, 8) * 15).astype("uint8")).resize((32, 32)).save(place / f"{at}.png")
    return folder


def trained(base: Path, data: Path, run: Path, *flags: str) -> Path:
    """Two experts of two steps, at a rate that moves the head far away."""
    settings = {"model.name_or_path": base, "task.name": "images", "task.data_dir": data, "task.templates": "simple"}
    settings |= {"task.train_head": "true", "task.dev_examples": 4, "training.batch_size": 8, "training.max_steps": 4}
    settings |= {"cascade.experts": 2, "training.learning_rate": 0.3, "training.data_workers": 0, "adapter.rank": 2}
    settings |= {"tracking.tensorboard": "false", "training.evaluate": "end", "output_dir": run}
    assert train([*(f"--{key}={value}" for key, value in settings.items()), *flags], RECIPE) == 0
    return run


Scored = Callable[..., tuple[dict[str, float], str]]


@pytest.fixture
def scored(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Scored:
    """Metrics of a subject on the test images, and what was printed."""
    count = iter(range(1000))

    def score(subject: Path, *flags: str) -> tuple[dict[str, float], str]:
        out = tmp_path / f"out{next(count)}"
        flags = "--images.templates=simple", "--dtype=float32", "--data_workers=0", *flags
        code = evaluate([str(subject), f"--output_dir={out}", "--tasks=images", f"--images.data_dir={data}", *flags])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads((out / "summary.json").read_text())["tasks"]["images"]["metrics"]["test"], printed.out

    return score


def test_a_trained_head_of_prototypes_is_read_wherever_it_lies(
    data: Path, tmp_path: Path, scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run, at an expert too, its model, its exports; and with its rows in another order."""
    monkeypatch.setenv("LORASC_SHARED", str(tmp_path))  # a tokenizer of bytes, which is quicker
    base = image_models.clip(tmp_path / "clip")
    targets = "--adapter.target_modules=vision_model.*.q_proj,vision_model.*.v_proj"
    run = trained(base, data, tmp_path / "run", targets, "--cascade.noise_intensity=0")
    assert Ledger.load(run / "ledger").classes == classes_of_head(run / "model") == NAMES
    expected, _ = scored(run)
    assert expected["loss"] == pytest.approx(
        json.loads((run / "summary.json").read_text())["eval"]["test"]["loss"], abs=1e-6
    )
    assert expected["loss"] != pytest.approx(scored(base)[0]["loss"], abs=0.01)
    assert scored(run, "--expert=2")[0] == expected
    found, printed = scored(run / "model")
    assert found == expected
    assert f"model {run / 'model'}, with its trained head" in printed
    for kind in ("merged", "adapter"):
        assert export([str(run), f"--output_dir={tmp_path / kind}", f"--as={kind}", "--compare=false"]) == 0
        flags = [f"--base={base}"] if kind == "adapter" else []
        assert scored(tmp_path / kind, *flags)[0] == pytest.approx(expected, abs=1e-5)

    head = read_head(run / "model")
    SavedHead({part: rows[TURNED] for part, rows in head.items()}, ("old dog", "bus", "cat")).save_pretrained(
        tmp_path / "merged"
    )
    found, printed = scored(tmp_path / "merged")
    assert found == expected
    assert "they are matched by name" in printed
    save_file({part: rows[:2] for part, rows in head.items()}, tmp_path / "merged" / "head.safetensors")
    assert (
        evaluate(
            [str(tmp_path / "merged"), f"--output_dir={tmp_path / 'no'}", "--tasks=images", f"--images.data_dir={data}"]
        )
        == 2
    )  # a head of two classes


def test_a_classifier_ships_the_names_of_its_classes_and_is_scored_by_them(
    data: Path, tmp_path: Path, scored: Scored, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base has three classes under other names in the first run: they do not ship."""
    base = image_models.vit(tmp_path / "vit", 3)
    rename(base, ["tram", "lion", "wolf"])
    targets = "--adapter.target_modules=q_proj,v_proj"
    run = trained(base, data, tmp_path / "run", targets, "--cascade.noise_intensity=0")
    assert "note      the classifier's outputs have other names than the classes, 3 of 3" in capsys.readouterr().out
    expected, printed = scored(run)
    assert "the classifier's outputs" not in printed
    assert export([str(run), f"--output_dir={tmp_path / 'first'}", "--expert=1", "--compare=false"]) == 0
    first, printed = scored(run, "--expert=1")
    assert "the classifier's outputs" not in printed  # the ledger names them, whatever the base does
    assert first == scored(tmp_path / "first")[0] != expected
    for folder in (run / "model", tmp_path / "first"):
        config = json.loads((folder / "config.json").read_text())
        assert config["id2label"] == {"0": "bus", "1": "cat", "2": "old dog"}
        assert config["label2id"] == {"bus": 0, "cat": 1, "old dog": 2}

    model = run / "model"
    tensors: dict[str, Any] = load_file(model / "model.safetensors")
    turned = {key: value[TURNED] if key.startswith("classifier.") else value for key, value in tensors.items()}
    save_file(turned, model / "model.safetensors", {"format": "pt"})
    rename(model, ["old_dog", "bus", "cat"])
    found, printed = scored(model)
    assert found == pytest.approx(expected, abs=1e-6)
    assert "they are matched by name" in printed
    rename(model, None)
    found, printed = scored(model)
    assert found["loss"] != pytest.approx(expected["loss"], abs=1e-3)
    assert "the classifier's outputs have no names" in printed

    rename(model, ["old_dog", "bus", "cat"])  # a frozen classifier, in its own order before and after
    other = trained(
        model, data, tmp_path / "other", targets, "--task.train_head=false", "--training.learning_rate=1e-9"
    )
    capsys.readouterr()
    assert json.loads((other / "model" / "config.json").read_text())["label2id"] == {"old dog": 0, "bus": 1, "cat": 2}
    for flags in ([], ["--expert=2"]):
        assert scored(other, *flags)[0] == pytest.approx(expected, abs=1e-5)


def rename(folder: Path, names: list[str] | None) -> None:
    """Give the outputs of a model these names; None: no names."""
    config = json.loads((folder / "config.json").read_text())
    names = [f"LABEL_{at}" for at in range(3)] if names is None else names
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))


def test_an_evaluation_advises_what_it_can_do(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has no task.train_head: that is training's."""
    for model in (image_models.vit(tmp_path / "ten", 10), image_models.dinov2(tmp_path / "none")):
        assert (
            evaluate([str(model), f"--output_dir={tmp_path / 'out'}", "--tasks=images", f"--images.data_dir={data}"])
            == 2
        )
        error = capsys.readouterr().err
        assert (
            "give a model of these classes, or train a new classifier (launch/train.py, task.train_head true)" in error
        )
