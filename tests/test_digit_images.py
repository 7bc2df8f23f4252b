"""The digits as images, and the vision transformer in the package that reads them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lorasc_ds.corruptions import corrupt
from lorasc_ds.image_task_config import DigitImagesConfig
from lorasc_ds.quickstart import make_vit
from lorasc_ds.task_config import DigitsConfig
from lorasc_ds.tasks import Example, Task, load_task
from lorasc_ds.tasks.digit_images import CORRUPTIONS

SIZES = {"train_examples": 40, "dev_examples": 20, "test_examples": 10}
VIT = Path(make_vit.__file__).parent / "vit"


def digit_images(seed: int = 0, **settings: object) -> Task:
    return load_task(DigitImagesConfig.model_validate({"name": "digit_images"} | SIZES | settings), seed)


def pixels(example: Example) -> NDArray[np.uint8]:
    (source,) = example.images
    image = Image.open(io.BytesIO(source.read()))
    assert (image.format, image.mode, source.name) == ("PNG", "RGB", example.id)
    return np.asarray(image)


def between_pixels() -> NDArray[np.float64]:
    """Of bilinear interpolation from 8 to 32 pixels, (32, 8): the weight of an old pixel's middle at a new one's."""
    at = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(8)))


@pytest.mark.parametrize("domain", ["upright", "mirrored", "rotated", "blurred"])
def test_the_images_are_those_of_task_digits(domain: str) -> None:
    """The same draw, the same wrong labels, and what the letters of the prompts say, enlarged."""
    shared = SIZES | {"domain": domain, "label_noise": 0.3}
    letters = load_task(DigitsConfig.model_validate(shared), 3)
    images = digit_images(3, **shared)
    weights = between_pixels()
    for split in ("train", "dev", "new_domain", "old_domain"):
        assert len(images.splits[split]) == len(letters.splits[split]) > 0
        for image, text in zip(images.splits[split], letters.splits[split], strict=True):
            assert image.gold == text.gold
            levels = np.array([ord(letter) - ord("a") for letter in text.prompt.split()[:64]]).reshape(8, 8)
            wanted = 255 - weights @ levels @ weights.T * 255 / 16
            # `digits` rounds the levels of a blurred image, half of one is 8 of 255
            assert np.abs(pixels(image) - wanted[..., None]).max() <= (9 if domain == "blurred" else 2)


def test_every_corruption_is_a_group_of_the_test_images() -> None:
    task = digit_images()
    copies = task.splits["new_domain_corrupted"]
    assert Counter(one.group for one in copies) == {f"{name}/{level}": 10 for name, level in CORRUPTIONS.items()}
    assert len({one.id for one in copies}) == len(copies)
    for group in range(len(CORRUPTIONS)):
        for at, clean in enumerate(task.splits["new_domain"]):
            copy = copies[10 * group + at]
            assert copy.gold == clean.gold
            name, level = copy.group.split("/")
            np.testing.assert_array_equal(pixels(copy), corrupt(pixels(clean), name, int(level), seed=at))
            assert (pixels(copy) != pixels(clean)).any()
    again = digit_images(7)
    assert [one.images[0].read() for one in again.splits["new_domain_corrupted"]] == [
        one.images[0].read() for one in copies
    ]


def test_the_classes_are_named_and_templates_chosen() -> None:
    classes = digit_images(templates="simple", head="classifier", train_head=True, crop_scale=[0.5, 1]).classes
    assert classes is not None
    assert classes.names == ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    assert classes.templates == ("a photo of a {}.",)
    assert (classes.head, classes.train_head, classes.crop_scale) == ("classifier", True, (0.5, 1))


def accuracy(examples: Sequence[Example]) -> float:
    """Of the model in the package, by transformers alone."""
    model = ViTForImageClassification.from_pretrained(VIT).eval()
    batch = ViTImageProcessorPil.from_pretrained(VIT)([pixels(one) for one in examples], return_tensors="pt")
    with torch.no_grad():
        found = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
    names = [model.config.id2label[label] for label in found.tolist()]
    return sum(name == make_vit.NAMES[one.gold[0]] for name, one in zip(names, examples, strict=True)) / len(examples)


def test_the_model_in_the_package_reads_upright_digits_and_not_mirrored_ones() -> None:
    task = digit_images(test_examples=500)
    assert accuracy(task.splits["old_domain"]) == pytest.approx(0.992, abs=0.002)
    assert accuracy(task.splits["new_domain"]) < 0.4
    assert (VIT / "model.safetensors").stat().st_size < 400_000


def test_what_makes_the_model_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch in place of all, so only the weights' values differ; `.ci/long` makes it whole."""
    monkeypatch.setattr("sys.argv", ["make_vit", str(tmp_path), "--epochs", "1"])
    make_vit.main()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in VIT.iterdir()}
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / name).read_text() == (VIT / name).read_text()
    assert (tmp_path / "model.safetensors").stat().st_size == (VIT / "model.safetensors").stat().st_size
