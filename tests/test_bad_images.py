"""Files that are no whole image: each is named in one line, and none takes memory or programs with it."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from lorasc_ds import images
from lorasc_ds.images import Unreadable, evaluation_pixels, preprocessing_of, rgb_image, training_pixels
from lorasc_ds.tasks.images import FileImage, StoredImage

CLIP = preprocessing_of({"image_processor_type": "CLIPImageProcessor"})


def encoded(image: Image.Image, form: str, **options: Any) -> StoredImage:
    file = io.BytesIO()
    image.save(file, form, **options)
    return StoredImage("photo", file.getvalue())


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(60, 80, 3), dtype=np.uint8))


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header says so, and that has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"once upon a time", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not an image"),
        (claiming(60_000, 60_000), "more than 89,478,485 pixels, a decompression bomb"),
        (claiming(10_000, 9_000), "more than 89,478,485 pixels, a decompression bomb"),  # of which PIL only warns
        (claiming(0, 5), "not an image"),
        (claiming(50, 50), "damaged"),
    ],
)
def test_bad_files_are_named(content: bytes, reason: str) -> None:
    before = warnings.filters.copy()
    with pytest.raises(Unreadable, match=f"^n01/bad.jpg: {reason}") as caught:
        evaluation_pixels(StoredImage("n01/bad.jpg", content), CLIP)
    assert "\n" not in str(caught.value)
    assert warnings.filters == before


def test_truncated_and_missing_files(picture: Image.Image, tmp_path: Path) -> None:
    whole = encoded(picture, "JPEG").content
    for end in (200, len(whole) // 2, len(whole) - 30):
        for pixels in (evaluation_pixels, lambda source, how: training_pixels(source, how, (0.9, 1.0), 0)):
            with pytest.raises(Unreadable, match=r"^bad: (damaged|not an image)"):
                pixels(StoredImage("bad", whole[:end]), CLIP)
    with pytest.raises(Unreadable, match=r"^n01/a.jpg: No such file or directory$"):
        evaluation_pixels(FileImage("n01/a.jpg", str(tmp_path / "a.jpg")), CLIP)
    with pytest.raises(Unreadable, match=r"^n01: Is a directory$"):
        evaluation_pixels(FileImage("n01", str(tmp_path)), CLIP)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.bmp", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(Unreadable, match=r"^a: File too large$"):
        evaluation_pixels(FileImage("a", str(tmp_path / "a.bmp")), CLIP)


def test_a_thin_image_does_not_grow_without_bound() -> None:
    source = encoded(Image.new("L", (100_000, 1)), "PNG")
    with pytest.raises(Unreadable, match=r"^photo: 100000 x 1 pixels are too far from a square to be resized$"):
        evaluation_pixels(source, CLIP)
    assert training_pixels(source, CLIP, (0.9, 1.0), 0).shape == (3, 224, 224)


def test_warnings_on_metadata_are_not_passed_on(picture: Image.Image) -> None:
    """ImageNet has such files: an EXIF block that says it is longer than it is."""
    broken = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05\x01\x12"
    source = encoded(picture, "JPEG", exif=broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert evaluation_pixels(source, CLIP).shape == (3, 224, 224)
    assert not caught


@dataclass(frozen=True)
class Lacking:
    """A source that runs out of memory."""

    name: str = "x"

    def read(self) -> bytes:
        return b"\x89PNG"


def test_a_machine_without_memory_is_not_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_image(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(images.Image, "open", open_image)
    with pytest.raises(MemoryError):
        evaluation_pixels(Lacking(), CLIP)


STEPS = np.array([[0, 257, 300], [32896, 65278, 65535]])  # of 16 bits; their 8 are 0, 1, 1, 128, 254 and 255


def graymap(values: np.ndarray, white: int) -> StoredImage:
    height, width = values.shape
    return StoredImage("photo", b"P5 %d %d %d\n" % (width, height, white) + values.astype(">u2").tobytes())


@pytest.mark.parametrize(
    "source",
    [
        encoded(Image.fromarray(STEPS.astype(np.uint16)), "PNG"),
        encoded(Image.fromarray(STEPS.astype(np.uint16)), "TIFF"),
        encoded(Image.fromarray(STEPS.astype(">u2")), "TIFF"),
        encoded(Image.fromarray((STEPS / 65535).astype(np.float32)), "TIFF"),
        graymap(STEPS, 65535),
    ],
    ids=["PNG", "TIFF", "TIFF, big-endian", "TIFF, floats", "PGM"],
)
def test_deep_greyscale_keeps_its_steps(source: StoredImage) -> None:
    """`Image.convert` makes all above 255 white, and all floats black."""
    image = rgb_image(source)
    assert image.mode == "RGB"
    assert np.asarray(image)[..., 1].tolist() == [[0, 1, 1], [128, 254, 255]]
    assert (np.asarray(image) == np.asarray(image)[..., :1]).all()


def test_deep_greyscale_may_be_transparent() -> None:
    source = encoded(Image.fromarray(STEPS.astype(np.uint16)), "PNG", transparency=257)
    assert np.asarray(rgb_image(source))[..., 0].tolist() == [[0, 255, 1], [128, 254, 255]]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (STEPS.astype(np.int32), "greyscale of 32 bits or with a sign does not say which number is white; save it"),
        ((STEPS / 257).astype(np.float32), "greyscale with numbers that are not from 0 to 1; scale them"),
        (np.full((2, 2), np.nan, np.float32), "greyscale with numbers that are not from 0 to 1; scale them"),
    ],
)
def test_greyscale_of_unknown_range_is_unreadable(values: np.ndarray, reason: str) -> None:
    with pytest.raises(Unreadable, match=f"^photo: {reason}"):
        rgb_image(encoded(Image.fromarray(values), "TIFF"))


JPEGS = {"photograph": ("RGB", {}), "subsampled": ("RGB", {"subsampling": 2}), "whole": ("RGB", {"subsampling": 0}), "progressive": ("RGB", {"progressive": True}), "grey": ("L", {}), "four inks": ("CMYK", {})}  # fmt: skip


@pytest.mark.parametrize("kind", JPEGS)
def test_simplejpeg_makes_pillows_pixels(kind: str, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, options = JPEGS[kind]
    calls: list[int] = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *arguments: (calls.append(1), decode(*arguments))[1])
    photo = encoded(picture.resize((333, 217)).convert(mode), "JPEG", **options)
    fast = np.asarray(rgb_image(photo))
    assert len(calls) == (mode == "RGB")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)  # as where it is not installed
    assert np.array_equal(fast, np.asarray(rgb_image(photo)))


def test_what_simplejpeg_refuses_is_judged_by_pillow(picture: Image.Image) -> None:
    photo = encoded(picture, "JPEG")
    with pytest.raises(Unreadable, match=r"^photo: damaged"):
        rgb_image(StoredImage("photo", photo.content[: len(photo.content) // 2]))
