"""Pixels of images: against Hugging Face's processors, torchvision's definition of a random crop, and bad files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    DeiTImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from lorasc_ds.errors import ConfigError
from lorasc_ds.images import (
    Preprocessing,
    evaluation_pixels,
    preprocessing_of,
    random_crop,
    training_pixels,
)
from lorasc_ds.tasks.images import StoredImage

CLIP = preprocessing_of({"image_processor_type": "CLIPImageProcessor"})


def stored(image: Image.Image, form: str = "PNG", **options: Any) -> StoredImage:
    file = io.BytesIO()
    image.save(file, form, **options)
    return StoredImage("photo", file.getvalue())


@pytest.fixture(scope="module")
def photographs() -> dict[str, Image.Image]:
    """China and a flower, 640 x 427."""
    found = find_spec("sklearn")  # not imported, which is slow
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent / "datasets" / "images"
    return {name: Image.open(folder / f"{name}.jpg").convert("RGB") for name in ("china", "flower")}


BOXES = [None, (10, 20, 311, 119), (5, 5, 104, 400), (100, 100, 103, 102), (0, 0, 224, 224), (7, 9, 8, 10)]
PROCESSORS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (CLIPImageProcessorPil, {}),
    (CLIPImageProcessorPil, {"size": {"shortest_edge": 97}, "crop_size": {"height": 75, "width": 130}}),
    (CLIPImageProcessorPil, {"do_resize": False, "do_rescale": False}),
    (SiglipImageProcessorPil, {"size": {"height": 65, "width": 131}, "do_normalize": False}),
    (ViTImageProcessorPil, {"rescale_factor": 1 / 127.5}),
    (BitImageProcessorPil, {"size": {"shortest_edge": 256}, "image_mean": [0.485, 0.456, 0.406]}),
    (DeiTImageProcessorPil, {}),
    (ConvNextImageProcessorPil, {"size": {"shortest_edge": 64}, "crop_pct": 0.9}),
    (ConvNextImageProcessorPil, {}),
]


@pytest.mark.parametrize(("kind", "settings"), PROCESSORS, ids=lambda value: getattr(value, "__name__", ""))
def test_pixels_are_those_of_hugging_faces_processor(
    kind: Callable[..., Any], settings: dict[str, Any], photographs: dict[str, Image.Image]
) -> None:
    processor = kind(**settings)
    how = preprocessing_of(processor.to_dict())
    assert how == preprocessing_of({"image_processor_type": kind.__name__, **settings})  # with what it leaves out
    mean, std = (np.array(value)[:, None, None] for value in (how.mean, how.std))
    for at, box in enumerate(BOXES):
        image = photographs[("china", "flower")[at % 2]].crop(box)
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        pixels = evaluation_pixels(stored(image), how)
        assert (pixels.dtype, pixels.shape[1:]) == (np.uint8, how.size)
        np.testing.assert_allclose((pixels / 255 - mean) / std, expected, atol=1e-5, rtol=1e-6)


def test_the_published_values_of_clip(photographs: dict[str, Image.Image]) -> None:
    """A file as the hub has it, with bare numbers; mean and std of protocols 6.2."""
    published = {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 224,
    }
    expected = Preprocessing(224, (224, 224), 3, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # fmt: skip
    assert preprocessing_of(published) == expected == CLIP
    # by PIL's own calls: shorter side to 224, bicubic, the longer rounded down, the middle
    image = photographs["china"].resize((335, 224), Image.Resampling.BICUBIC).crop((55, 0, 279, 224))
    pixels = evaluation_pixels(stored(photographs["china"]), CLIP)
    assert np.array_equal(pixels, np.asarray(image).transpose(2, 0, 1))
    assert preprocessing_of({"feature_extractor_type": "ViTFeatureExtractor", "size": 384}).resize == (384, 384)


def transparent(mode: str) -> Callable[[Image.Image], StoredImage]:
    def make(image: Image.Image) -> StoredImage:
        image = image.copy()
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        return stored(image.convert(mode))

    return make


def palette_with_hole(image: Image.Image) -> StoredImage:
    return stored(image.quantize(16), transparency=3)


def sideways(image: Image.Image) -> StoredImage:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return stored(image, "JPEG", exif=exif)


@pytest.mark.parametrize(
    "make",
    [
        lambda image: stored(image, "JPEG", quality=90),
        lambda image: stored(image, "JPEG", progressive=True, subsampling=0),
        lambda image: stored(image.convert("L"), "JPEG"),
        lambda image: stored(image.convert("CMYK"), "JPEG"),
        lambda image: stored(image.convert("L")),
        lambda image: stored(image.convert("1")),
        lambda image: stored(image.quantize(16)),
        palette_with_hole,
        transparent("RGBA"),
        transparent("LA"),
        sideways,
        lambda image: stored(image, "WEBP"),
        lambda image: stored(image, "GIF"),
        lambda image: stored(image, "TIFF"),
        lambda image: stored(image, "BMP"),
        lambda image: stored(image, "PPM"),
    ],
)
def test_every_kind_of_file_becomes_what_the_processor_makes_of_it(
    make: Callable[[Image.Image], StoredImage], photographs: dict[str, Image.Image]
) -> None:
    source = make(photographs["china"].crop((30, 40, 130, 100)))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    expected = processor(Image.open(io.BytesIO(source.content)), do_rescale=False, do_normalize=False)["pixel_values"][
        0
    ]
    how = preprocessing_of(processor.to_dict())
    assert np.array_equal(evaluation_pixels(source, how), expected)


class FixedRandom:
    """Gives given numbers in the place of a generator's."""

    def __init__(self, uniform: list[float], integers: list[int]) -> None:
        self.given, self.whole, self.asked = uniform, integers, []

    def uniform(self, low: float, high: float) -> float:
        return low + self.given.pop(0) * (high - low)

    def integers(self, high: int) -> int:
        self.asked.append(high)
        return self.whole.pop(0)


def test_a_random_crop_by_hand() -> None:
    """Half of 400 x 300 at the aspect exp(0) = 1: a square of side sqrt(60000) = 244.9."""
    random: Any = FixedRandom([0.5, 0.5], [7, 11])
    assert random_crop(400, 300, (0.4, 0.6), random) == (11, 7, 245, 245)
    assert random.asked == [300 - 245 + 1, 400 - 245 + 1]
    # aspects of 4/3, 3/4: the first is too wide for 300 x 400, the second just fits
    random = FixedRandom([1.0, 1.0, 1.0, 0.0], [0, 0])
    assert random_crop(300, 400, (1.0, 1.0), random) == (0, 0, 300, 400)
    random = FixedRandom([1.0, 1.0] * 10, [])
    assert random_crop(300, 400, (1.0, 1.0), random) == (0, 0, 300, 400)  # ten tries: all of it, whose aspect is 3/4
    random = FixedRandom([1.0, 0.5] * 10, [])
    assert random_crop(100, 1000, (1.0, 1.0), random) == (0, (1000 - 133) // 2, 100, 133)
    random = FixedRandom([1.0, 0.5] * 10, [])
    assert random_crop(1000, 100, (1.0, 1.0), random) == ((1000 - 133) // 2, 0, 133, 100)


def test_random_crops_are_distributed_as_defined() -> None:
    crops = [random_crop(1000, 1000, (0.2, 0.5), np.random.default_rng(seed)) for seed in range(2000)]
    areas = np.array([width * height / 1e6 for _, _, width, height in crops])
    aspects = np.array([math.log(width / height) for _, _, width, height in crops])
    corners = np.array([left / (1000 - width) for left, _, width, _ in crops])
    for found, low, high in ((areas, 0.2, 0.5), (aspects, math.log(3 / 4), math.log(4 / 3)), (corners, 0, 1)):
        uniform = np.sort((found - low) / (high - low))
        assert np.abs(uniform - np.linspace(0, 1, len(uniform))).max() < 1.95 / math.sqrt(len(uniform))  # KS, 0.1 %


def test_training_pixels_depend_on_the_seed_alone(photographs: dict[str, Image.Image]) -> None:
    source = stored(photographs["flower"])
    first = training_pixels(source, CLIP, (0.5, 1.0), 5)
    assert (first.shape, first.dtype) == ((3, 224, 224), np.uint8)
    np.random.seed(1)
    assert np.array_equal(first, training_pixels(source, CLIP, (0.5, 1.0), 5))
    assert not np.array_equal(first, training_pixels(source, CLIP, (0.5, 1.0), 6))
    left, top, width, height = random_crop(640, 427, (0.5, 1.0), np.random.default_rng(5))
    crop = photographs["flower"].crop((left, top, left + width, top + height))
    assert np.array_equal(first, np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1))


CLIP_FILE = {"image_processor_type": "CLIPImageProcessor"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "image_processor_type 'None', but only those of CLIP, "),
        ({"image_processor_type": "PerceiverImageProcessor"}, "image_processor_type 'PerceiverImageProcessor'"),
        ({**CLIP_FILE, "do_pad": True}, "do_pad True, but false is needed"),
        ({**CLIP_FILE, "size": {"longest_edge": 9}}, "size {'longest_edge': 9}, but shortest_edge, or height and width"),
        ({**CLIP_FILE, "size": {"shortest_edge": 9, "longest_edge": 90}}, "size {'shortest_edge'"),
        ({**CLIP_FILE, "size": {"height": 0, "width": 9}}, "size {'height': 0"),
        ({**CLIP_FILE, "crop_size": {"shortest_edge": 9}}, "crop_size {'shortest_edge': 9}, but a height and a width"),
        ({**CLIP_FILE, "do_center_crop": False}, "do_center_crop False, but true, or a size with height and width"),
        ({**CLIP_FILE, "resample": 9}, "resample 9, but a number from 0 to 5"),
        ({**CLIP_FILE, "rescale_factor": 0}, "rescale_factor 0, but a number above 0"),
        ({**CLIP_FILE, "image_mean": [0.5, 0.5]}, r"image_mean \[0.5, 0.5\], but three numbers"),
        ({**CLIP_FILE, "image_std": [0.5, 0.5, 0]}, r"image_std \[0.5, 0.5, 0\], but numbers above 0"),
        ({"image_processor_type": "ConvNextImageProcessor", "do_center_crop": True, "crop_size": 9}, "do_center_crop True, but false"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^preprocessor_config.json has {said}") as caught:
        preprocessing_of(settings)
    assert "\n" not in str(caught.value)
