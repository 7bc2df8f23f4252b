"""Digital corruptions. Images are (h, w, 3) uint8; what comes back are grey levels, which may leave 0 to 255."""

from __future__ import annotations

import io

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

Levels = NDArray[np.float64]


def brightness(image: NDArray[np.uint8], added: float, rng: Generator) -> Levels:
    """Added to the value of HSV; hue and saturation stay, so all three channels grow by one factor."""
    value = image.max(axis=2, keepdims=True)
    brighter = np.minimum(value + 255 * added, 255)
    return np.where(value > 0, image * (brighter / np.maximum(value, 1)), brighter)


def contrast(image: NDArray[np.uint8], kept: float, rng: Generator) -> Levels:
    """Towards the mean of each channel."""
    mean = image.mean(axis=(0, 1))
    return (image - mean) * kept + mean


def pixelate(image: NDArray[np.uint8], kept: float, rng: Generator) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    small = max(1, int(width * kept)), max(1, int(height * kept))
    box = Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize(small, box).resize((width, height), box))


def jpeg_compression(image: NDArray[np.uint8], quality: int, rng: Generator) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def elastic_transform(
    image: NDArray[np.uint8], settings: tuple[float, float, float], rng: Generator, unit: float
) -> Levels:
    """A random affine map, then random shifts that vary smoothly; both in multiples of `unit` pixels."""
    from scipy.ndimage import map_coordinates

    strength, sigma, reach = (unit * setting for setting in settings)
    height, width = image.shape[:2]
    middle, arm = np.array([width // 2, height // 2]), min(height, width) // 3
    corners = middle + arm * np.array([[1, 1], [1, -1], [-1, -1]])  # x, y
    moved = corners + rng.uniform(-reach, reach, corners.shape)
    y, x = np.indices((height, width)).astype(float)
    source_x, source_y = affine(moved, corners, x, y)
    shift_x, shift_y = (strength * smooth_noise(height, width, sigma, rng) for _ in range(2))

    def sampled(levels: Levels, at: tuple[Levels, Levels], mode: str) -> Levels:
        return np.stack([map_coordinates(c, at, order=1, mode=mode) for c in np.moveaxis(levels, 2, 0)], axis=2)

    return sampled(sampled(image.astype(float), (source_y, source_x), "mirror"), (y + shift_y, x + shift_x), "reflect")


def affine(points: Levels, images: NDArray[np.intp], x: Levels, y: Levels) -> tuple[Levels, Levels]:
    """x and y under the affine map that takes three points (3, 2) to their images; the first point if they are one."""
    ones = np.ones((3, 1))
    a = np.linalg.lstsq(np.hstack([points, ones]), images.astype(float), rcond=None)[0]
    return a[0, 0] * x + a[1, 0] * y + a[2, 0], a[0, 1] * x + a[1, 1] * y + a[2, 1]


def smooth_noise(height: int, width: int, sigma: float, rng: Generator) -> Levels:
    """Uniform noise from -1 to 1 under a Gaussian of 3 sigmas, mirrored beyond the edges.

    Such a filter only scales the cosines of the DCT: quick, where sigma is most of the image.
    """
    from scipy.fft import dctn, idctn

    taps = np.arange(-int(3 * sigma + 0.5), int(3 * sigma + 0.5) + 1)
    weights = np.exp(-(taps**2) / (2 * max(sigma, 1e-3) ** 2))
    weights /= weights.sum()
    gain = [np.cos(np.pi / side * np.outer(np.arange(side), taps)) @ weights for side in (height, width)]
    noise = rng.uniform(-1, 1, (height, width))
    return np.asarray(idctn(np.asarray(dctn(noise)) * np.outer(*gain)))
