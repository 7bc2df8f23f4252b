"""Weather. Images are (h, w, 3) uint8; what comes back are grey levels as float, which may leave 0 to 255."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from lorasc_ds.corruptions.blur import moved, zoomed
from lorasc_ds.corruptions.ice import ice

GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
CIFAR_FROST = 0.2  # CIFAR-10-C reduces its photographs of frost to this share of their sides


def snow(image: NDArray[np.uint8], settings: tuple[float, ...], rng: Generator) -> NDArray[np.float64]:
    """Flakes are enlarged noise above a threshold, blurred by their fall, twice; the picture itself whitens."""
    mean, deviation, zoom, threshold, radius, sigma, kept = settings
    flakes = zoomed(rng.normal(mean, deviation, image.shape[:2]), zoom)
    flakes = np.floor(255 * np.clip(np.where(flakes < threshold, 0, flakes), 0, 1))
    flakes = np.round(moved(flakes, radius, sigma, rng.uniform(-135, -45)))[..., None]
    white = np.maximum(image, (image @ GREY)[..., None] * 1.5 + 127.5)
    return kept * image + (1 - kept) * white + flakes + np.rot90(flakes, 2)


def frost(
    image: NDArray[np.uint8],
    weights: tuple[float, float],
    rng: Generator,
    textures: Sequence[NDArray[np.uint8]],
    small: bool,
) -> NDArray[np.float64]:
    """A texture over the image: a random part of a random one of `textures` (h, w, 3); of none, made-up ice."""
    height, width = image.shape[:2]
    if textures:
        texture = textures[int(rng.integers(len(textures)))]
        texture = covering(texture, height, width, CIFAR_FROST if small else 1)
        top, left = (rng.integers(have - need + 1) for have, need in zip(texture.shape, (height, width), strict=False))
        layer = texture[top : top + height, left : left + width]
    else:
        layer = ice(height, width, rng)
    return weights[0] * image + weights[1] * layer


def covering(texture: NDArray[np.uint8], height: int, width: int, scale: float) -> NDArray[np.uint8]:
    """The texture at a scale, or at the smallest above at which it covers height x width."""
    have = texture.shape[:2]
    scale = max(scale, height / have[0], width / have[1])
    if scale == 1:
        return texture
    size = max(width, round(have[1] * scale)), max(height, round(have[0] * scale))
    return np.asarray(Image.fromarray(texture).resize(size, Image.Resampling.BILINEAR))


def fog(image: NDArray[np.uint8], settings: tuple[float, float], rng: Generator) -> NDArray[np.float64]:
    """Plasma is added, and all is darkened until the brightest value is as bright as it may have become."""
    thickness, decay = settings
    height, width = image.shape[:2]
    brightest = image.max() / 255
    haze = plasma(1 << (max(height, width, 2) - 1).bit_length(), decay, rng)[:height, :width, None]
    return (image + 255 * thickness * haze) * (brightest / (brightest + thickness))


def plasma(side: int, decay: float, rng: Generator) -> NDArray[np.float64]:
    """A (side, side) landscape from 0 to 1 by the diamond-square algorithm on a torus; `side`: a power of two.

    The middle of four known heights is their mean and a chance part, `decay`² smaller at every halving.
    """
    heights = np.zeros((side, side))
    amplitude, step = 1.0, side

    def middle(four: NDArray[np.float64]) -> NDArray[np.float64]:
        return four / 4 + amplitude * rng.uniform(-1, 1, four.shape)

    while step > 1:
        half = step // 2
        corners = heights[::step, ::step]
        across, down = corners + np.roll(corners, -1, 1), corners + np.roll(corners, -1, 0)
        centres = middle(across + np.roll(across, -1, 0))
        heights[half::step, half::step] = centres
        heights[::step, half::step] = middle(across + centres + np.roll(centres, 1, 0))
        heights[half::step, ::step] = middle(down + centres + np.roll(centres, 1, 1))
        amplitude, step = amplitude / decay**2, half
    return (heights - heights.min()) / np.ptp(heights)
