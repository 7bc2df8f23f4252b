"""From the file of an image to pixels of the network's size. numpy and PIL alone: worker processes import this.

The geometry is that of Hugging Face's image processors with their PIL backend, bit by bit; the network itself
normalises, so that a batch travels as bytes.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lorasc_ds.errors import ConfigError
from lorasc_ds.tasks.base import ImageSource

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")  # others, such as EPS, run programs
MAX_PIXELS = 89_478_485  # PIL's own limit against decompression bombs: 256 MiB as RGB
ASPECTS = (3 / 4, 4 / 3)  # of a random crop, width by height
TRIES = 10

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
CLIP = {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
SQUARE = {"size": {"height": 224, "width": 224}, "do_center_crop": False}
PROCESSORS: dict[str, dict[str, Any]] = {  # by the beginning of their names: what a file may leave out
    "CLIP": CLIP,
    "ChineseCLIP": CLIP,
    "Bit": CLIP,  # DINOv2
    "Siglip": {**SQUARE, "resample": 3, **HALF},
    "ViT": {**SQUARE, "resample": 2, **HALF},
    "DINOv3ViT": {**SQUARE, "resample": 2, **IMAGENET},
    "DeiT": {**CLIP, "size": {"height": 256, "width": 256}, **HALF},
    "Beit": {**CLIP, "size": {"height": 256, "width": 256}, **HALF},
    "ConvNext": {"size": {"shortest_edge": 384}, "do_center_crop": False, "resample": 3, **HALF},
}
SHORTER_SIDE = ("CLIP", "ChineseCLIP", "Bit", "ConvNext")  # what a bare number means as their size


class Unreadable(Exception):
    """An image that cannot be had as pixels: its name and, in a line, why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name, why)
        self.why = why

    def __str__(self) -> str:
        return ": ".join(self.args)


class UnknownRange(ValueError):
    """A greyscale image that does not say how bright its numbers are."""


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What comes between an image file and the network.

    Args:
        resize: to a shorter side, to (height, width), or not at all (None).
        crop: (height, width) of the middle that is kept, black where the image is smaller; None: all of it.
        resample: PIL's number of the filter: 2 bilinear, 3 bicubic.
        mean, std: of red, green and blue: the network sees (pixel / 255 - mean) / std.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the result."""
        found = self.crop or self.resize
        assert isinstance(found, tuple)
        return found


def preprocessing_of(settings: Mapping[str, Any]) -> Preprocessing:
    """What the `preprocessor_config.json` of a CLIP, SigLIP, ViT, DINOv2, DeiT, BEiT or ConvNeXt asks for.

    Any rescale factor f is honoured, and none: x f is x / 255 with mean and std divided by 255 f.

    Raises:
        ConfigError: it asks for what is not done here.
    """
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type"))
    family = kind.removesuffix("Fast").removesuffix("Pil").removesuffix("ImageProcessor")
    family = family.removesuffix("FeatureExtractor")
    if family not in PROCESSORS:
        raise ConfigError(
            f"preprocessor_config.json has image_processor_type {kind!r}, but only those of"
            f" {', '.join(PROCESSORS)} are known here: choose a model that has one of them"
        )
    settings = {**PROCESSORS[family], **{key: value for key, value in settings.items() if value is not None}}
    for key in ("do_pad", "do_flip_channel_order"):
        if settings.get(key):
            raise refused(key, settings[key], "false")
    resize = size_of(settings, "size", family in SHORTER_SIDE) if settings.get("do_resize", True) else None
    crop = size_of(settings, "crop_size", False) if settings["do_center_crop"] else None
    if isinstance(crop, int):
        raise refused("crop_size", settings["crop_size"], "a height and a width")
    if family == "ConvNext" and isinstance(resize, int):
        resize, crop = convnext(resize, number(settings, "crop_pct", 224 / 256), crop)
    resample = settings["resample"]
    if resample not in list(Image.Resampling):
        raise refused("resample", resample, "a number from 0 to 5")
    scale = 255 * number(settings, "rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-4) else scale  # files write 0.00392156862745098
    normal = settings.get("do_normalize", True)
    mean = colours(settings, "image_mean", scale) if normal else (0.0, 0.0, 0.0)
    std = colours(settings, "image_std", scale) if normal else (1 / scale, 1 / scale, 1 / scale)
    if min(std) <= 0:
        raise refused("image_std", settings["image_std"], "numbers above 0")
    if crop is None and not isinstance(resize, tuple):
        raise refused("do_center_crop", False, "true, or a size with height and width: all images of a batch are alike")
    return Preprocessing(resize, crop, int(resample), mean, std)


def refused(key: str, value: object, needed: str) -> ConfigError:
    return ConfigError(
        f"preprocessor_config.json has {key} {value!r}, but {needed} is needed here: change it, or choose another model"
    )


def size_of(settings: Mapping[str, Any], key: str, shorter_side: bool) -> int | tuple[int, int]:
    """A shorter side, or (height, width).

    Args:
        shorter_side: whether a bare number, as old files have it, is that of the shorter side, not of both.
    """
    match settings[key]:
        case int(side) if side > 0 and shorter_side:
            return side
        case int(side) if side > 0:
            return side, side
        case {"shortest_edge": int(side), **rest} if side > 0 and not any(rest.values()):
            return side
        case {"height": int(height), "width": int(width), **rest} if min(height, width) > 0 and not any(rest.values()):
            return height, width
        case other:
            raise refused(key, other, "shortest_edge, or height and width")


def number(settings: Mapping[str, Any], key: str, default: float) -> float:
    value = settings.get(key, default)
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise refused(key, value, "a number above 0")
    return float(value)


def colours(settings: Mapping[str, Any], key: str, scale: float) -> tuple[float, float, float]:
    match settings[key]:
        case [float() | int() as red, float() | int() as green, float() | int() as blue]:
            return red / scale, green / scale, blue / scale
        case other:
            raise refused(key, other, "three numbers")


def convnext(
    side: int, kept: float, crop: tuple[int, int] | None
) -> tuple[int | tuple[int, int], tuple[int, int] | None]:
    """ConvNeXt's geometry: below 384 pixels the middle of an image that is larger by 1 / `kept`, else all, squeezed."""
    if crop is not None:
        raise refused("do_center_crop", True, "false")
    return (int(side / kept), (side, side)) if side < 384 else ((side, side), None)


def evaluation_pixels(source: ImageSource, how: Preprocessing) -> NDArray[np.uint8]:
    """Red, green and blue, (3, height, width).

    Raises:
        Unreadable: the image cannot be decoded.
    """
    image = rgb_image(source)
    if how.resize is not None:
        width, height = image.size
        shape = how.resize if isinstance(how.resize, tuple) else shorter_side(height, width, how.resize)
        if math.prod(shape) > MAX_PIXELS:
            raise Unreadable(source.name, f"{width} x {height} pixels are too far from a square to be resized")
        image = image.resize((shape[1], shape[0]), how.resample)
    if how.crop is not None:
        height, width = how.crop
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return channels_first(image)


def training_pixels(
    source: ImageSource, how: Preprocessing, crop_scale: tuple[float, float], seed: int
) -> NDArray[np.uint8]:
    """A random crop, resized to the network's size, (3, height, width).

    Args:
        crop_scale: share of the image's area that the crop has, from and to.
        seed: gives the crop, with the image's size.

    Raises:
        Unreadable: the image cannot be decoded.
    """
    image = rgb_image(source)
    left, top, width, height = random_crop(image.width, image.height, crop_scale, np.random.default_rng(seed))
    height_out, width_out = how.size
    cropped = image.crop((left, top, left + width, top + height))
    return channels_first(cropped.resize((width_out, height_out), how.resample))


def random_crop(
    width: int, height: int, scale: tuple[float, float], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop, as torchvision's RandomResizedCrop draws it.

    Its share of the area is uniform in `scale`, the logarithm of its aspect ratio uniform between 3/4 and 4/3. Where no
    try fits into the image, the largest middle is taken whose aspect ratio is allowed.
    """
    low, high = ASPECTS
    for _ in range(TRIES):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(low), math.log(high)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(random.integers(height - crop_height + 1))
            left = int(random.integers(width - crop_width + 1))
            return left, top, crop_width, crop_height
    crop_width, crop_height = width, height
    if width / height < low:
        crop_height = round(width / low)
    elif width / height > high:
        crop_width = round(height * high)
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def shorter_side(height: int, width: int, side: int) -> tuple[int, int]:
    """The height and width of an image that is resized to a shorter side; the longer is rounded down."""
    longer = int(side * max(height, width) / min(height, width))
    return (longer, side) if width <= height else (side, longer)


def rgb_image(source: ImageSource) -> Image.Image:
    """The image as it is stored, not turned by its EXIF data; what is transparent is white.

    Greyscale of more than 8 bits is scaled, see `eight_bits`; of 16-bit colours the higher 8 are taken.

    Raises:
        Unreadable: the file cannot be read, is not an image in one of `FORMATS`, is damaged, has more than
            `MAX_PIXELS`, or does not say which number is white.
    """
    try:
        content = source.read()
    except OSError as error:
        raise Unreadable(source.name, f"{error.strerror or error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on metadata, which is not used
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return jpeg_to_rgb(image, content) if (image.format, image.mode) == ("JPEG", "RGB") else to_rgb(image)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise Unreadable(source.name, f"more than {MAX_PIXELS:,} pixels, a decompression bomb") from error
        except Image.UnidentifiedImageError as error:
            raise Unreadable(source.name, f"not an image ({', '.join(FORMATS)})") from error
        except MemoryError:
            raise
        except UnknownRange as error:
            raise Unreadable(source.name, f"{error}") from error
        except Exception as error:  # of many decoders, and none of them says which it raises
            raise Unreadable(source.name, f"damaged ({' '.join(f'{error}'.split())})") from error


def jpeg_to_rgb(image: Image.Image, content: bytes) -> Image.Image:
    """By simplejpeg where it is installed: the same pixels, sooner. What it refuses is Pillow's to judge."""
    try:
        import simplejpeg
    except ImportError:
        return to_rgb(image)
    try:
        return Image.fromarray(simplejpeg.decode_jpeg(content, "RGB"))
    except ValueError:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale with 8 bits: 0 is black, and white is 65535 of whole numbers, 1 of floating-point ones; rounded.

    Raises:
        UnknownRange: whole numbers of 32 bits, or with a sign, or numbers that are not from 0 to 1.
    """
    values = np.asarray(image)
    if image.mode == "I" and image.format != "PPM":  # whose numbers PIL has scaled to 16 bits
        raise UnknownRange("greyscale of 32 bits or with a sign does not say which number is white; save it with 16")
    white = 1 if image.mode == "F" else 65535
    if not np.all((values >= 0) & (values <= white)):
        raise UnknownRange(f"greyscale with numbers that are not from 0 to {white}; scale them")
    grey = np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    grey[values == image.info.get("transparency")] = 255
    return Image.fromarray(grey)


def channels_first(image: Image.Image) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
