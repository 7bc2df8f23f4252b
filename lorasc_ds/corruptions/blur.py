"""Blurs. Images are (h, w, 3) uint8; what comes back are grey levels as float, which may leave 0 to 255."""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from lorasc_ds.corruptions.levels import to_bytes

Levels = NDArray[np.float64]


def defocus_blur(image: NDArray[np.uint8], settings: tuple[float, float], rng: Generator) -> Levels:
    """The image of a point is a disk; beyond its edge the picture is mirrored. No chance in it."""
    kernel = disk(*settings)
    reach = len(kernel) // 2
    padded = np.pad(image.astype(float), ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    size = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, s=size)[..., None]
    return np.fft.irfft2(spectrum, s=size, axes=(0, 1))[2 * reach :, 2 * reach :]


def disk(radius: float, edge: float) -> Levels:
    """A disk of sum 1 on a grid of at least 17 x 17, its edge blurred by a Gaussian of sigma `edge` over 3 (5) pixels.

    Where it touches the grid's border (radius 8 and 10) the published kernel sums to 1.013 and 1.011; so does this one.
    """
    from scipy.ndimage import correlate1d

    half, taps = (8, np.arange(-1, 2)) if radius <= 8 else (math.ceil(radius), np.arange(-2, 3))
    y, x = np.ogrid[-half : half + 1, -half : half + 1]
    kernel = (x**2 + y**2 <= radius**2).astype(float)
    weights = np.exp(-(taps**2) / (2 * edge**2))
    for axis in (0, 1):
        kernel = correlate1d(kernel, weights / weights.sum(), axis, mode="mirror")
    return kernel / (x**2 + y**2 <= radius**2).sum()


def glass_blur(image: NDArray[np.uint8], settings: tuple[float, int, int], rng: Generator) -> Levels:
    """Frosted glass: pixels change places with near ones, between two slight blurs."""
    sigma, reach, rounds = settings
    pixels = to_bytes(gaussian(image, sigma))
    for _ in range(rounds):
        pixels = pixels.reshape(-1, 3)[scattered(image.shape[0], image.shape[1], reach, rng)].reshape(image.shape)
    return gaussian(pixels, sigma)


def gaussian(image: NDArray[np.uint8], sigma: float) -> Levels:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(image.astype(float), (sigma, sigma, 0), mode="nearest")


def scattered(height: int, width: int, reach: int, rng: Generator) -> NDArray[np.intp]:
    """Where every pixel comes from, (h * w) indices, after one round of the shuffle of glass.

    The published loop goes through the pixels from the last to the first and sets each to one at most `reach` away.
    (It means to exchange the two, but its values are views of the same array, so the other one keeps its own.) A
    source that had its turn already shows what that one was set to: chains, which are followed all at once here.
    """
    pixels = height * width
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    offsets = rng.integers(-reach, reach, size=(2, len(rows), len(columns)))
    target = rows[:, None] * width + columns
    source_row, source_column = rows[:, None] + offsets[0], columns + offsets[1]
    source = source_row * width + source_column
    inside = (source_row > reach) & (source_row <= height - reach)
    inside &= (source_column > reach) & (source_column <= width - reach)
    # Entries from 0: a pixel as it was; from `pixels` on: the same as it becomes.
    link = np.tile(np.arange(pixels), 2)
    link[pixels + target] = np.where(inside & (source > target), pixels + source, source)
    while not np.array_equal(link, followed := link[link]):
        link = followed
    return link[pixels:]


def motion_blur(image: NDArray[np.uint8], settings: tuple[float, float], rng: Generator) -> Levels:
    """8 bits between, as the published code has them."""
    return np.round(moved(image.astype(float), *settings, rng.uniform(-45, 45)))


def moved(levels: Levels, radius: float, sigma: float, angle: float) -> Levels:
    """ImageMagick's motion blur: half a Gaussian of 2 * radius + 1 taps, one pixel apart along a line.

    Args:
        levels: (h, w, ...); beyond the edge it goes on as there.
        angle: of the line from a pixel to those it takes in, in degrees, clockwise from the right.
    """
    taps = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    right = np.ceil(taps * math.cos(math.radians(angle)) - 0.5).astype(int)
    down = np.ceil(taps * math.sin(math.radians(angle)) - 0.5).astype(int)
    reach = len(taps)
    height, width = levels.shape[:2]
    padded = np.pad(levels, [(reach, reach), (reach, reach), *[(0, 0)] * (levels.ndim - 2)], mode="edge")
    blurred = np.zeros_like(levels)
    for weight, x, y in zip(weights / weights.sum(), reach + right, reach + down, strict=True):
        blurred += weight * padded[y : y + height, x : x + width]
    return blurred


def zoom_blur(image: NDArray[np.uint8], settings: tuple[float, float], rng: Generator) -> Levels:
    """The mean of the image and of its zooms, the first of which is by 1. No chance in it."""
    factors = np.arange(1, *settings)
    levels = image.astype(float)
    return (levels + sum(zoomed(levels, factor) for factor in factors)) / (len(factors) + 1)


def zoomed(levels: Levels, factor: float) -> Levels:
    """The middle of (h, w, ...), enlarged by linear interpolation to the size of the whole."""
    for axis in (0, 1):
        whole = levels.shape[axis]
        part = math.ceil(whole / factor)
        enlarged = round(part * factor)
        place = (np.arange(whole) + (enlarged - whole) // 2) * ((part - 1) / max(enlarged - 1, 1))
        low = np.minimum(place.astype(int), max(part - 2, 0))
        share = (place - low).reshape(-1, *[1] * (levels.ndim - 1 - axis))
        first = (whole - part) // 2 + low
        second = np.minimum(first + 1, whole - 1)
        levels = np.take(levels, first, axis) * (1 - share) + np.take(levels, second, axis) * share
    return levels
