"""Noise. Images are (h, w, 3) uint8; what comes back are grey levels as float, which may leave 0 to 255."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray


def gaussian_noise(image: NDArray[np.uint8], deviation: float, rng: Generator) -> NDArray[np.floating]:
    return image + 255 * rng.normal(scale=deviation, size=image.shape)


def shot_noise(image: NDArray[np.uint8], photons: float, rng: Generator) -> NDArray[np.floating]:
    """Light is counted: a Poisson number of photons, `photons` on average where a pixel is white."""
    return rng.poisson(image / 255 * photons) * (255 / photons)


def impulse_noise(image: NDArray[np.uint8], share: float, rng: Generator) -> NDArray[np.floating]:
    """Every value by itself becomes 0 or 255 with probability `share`, both alike."""
    hit = rng.random(image.shape) < share
    salt = rng.random(image.shape) < 0.5
    return np.where(hit, 255.0 * salt, image)
