"""Made-up frost, for those who have no photographs of it. Not comparable with ImageNet-C's, whose are photographs."""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

DARK, LIGHT = np.array([62.0, 84.0, 96.0]), np.array([232.0, 242.0, 252.0])  # glass behind, and the ice on it
STEMS, STEPS, FORK = 16, 24, math.pi / 3  # six-sided crystals branch at 60 degrees
FINENESS = 2  # canvas pixels of a pixel, so that lines are smooth


def ice(height: int, width: int, rng: Generator) -> NDArray[np.float64]:
    """Feathers of ice on a hazy pane, (h, w, 3), as bright on average as photographs of frost are."""
    from scipy.ndimage import gaussian_filter

    side = min(height, width)
    feathers = drawn(height, width, feather_lines(rng))
    haze = gaussian_filter(rng.normal(size=(height, width)), side / 12, mode="wrap")
    haze = (haze - haze.min()) / max(np.ptp(haze), 1e-9)
    grains = gaussian_filter(rng.normal(size=(height, width)), 0.7, mode="wrap")
    glow = gaussian_filter(feathers, side / 40, mode="nearest")
    cover = 0.15 + 0.3 * haze + 0.6 * feathers + 0.5 * glow + 0.1 * grains
    return DARK + (LIGHT - DARK) * np.clip(cover, 0, 1)[..., None]


def feather_lines(rng: Generator) -> list[tuple[NDArray[np.float64], float]]:
    """Lines (n, 2, 2) from x, y to x, y on a pane of side 1, each lot with its brightness, the finest first."""
    start = rng.uniform(-0.1, 1.1, (STEMS, 2))
    length = rng.uniform(0.4, 1.0, STEMS)
    turns = rng.normal(0, 0.06, (STEMS, STEPS))
    angle = rng.uniform(0, 2 * math.pi, (STEMS, 1)) + np.cumsum(turns, axis=1)
    path = start[:, None] + np.cumsum(step(angle, length[:, None] / STEPS), axis=1)
    stems = np.stack([path[:, :-1], path[:, 1:]], axis=2).reshape(-1, 2, 2)
    left = np.linspace(1, 0.1, STEPS) * length[:, None]  # a feather tapers
    branches, angle, left = fork(path, angle, 0.28 * left * rng.uniform(0.5, 1, left.shape))
    along = np.linspace(0.15, 0.9, 7)
    base = branches[:, None, 0] + along[:, None] * (branches[:, None, 1] - branches[:, None, 0])
    twigs, _, _ = fork(base, np.tile(angle[:, None], 7), 0.35 * left[:, None] * (1 - along))
    return [(twigs, 0.55), (branches, 0.8), (stems, 1.0)]


def fork(
    base: NDArray[np.float64], angle: NDArray[np.float64], length: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Two lines from every base (..., 2), to both sides: the lines (n, 2, 2), their angles and lengths (n,)."""
    angles = np.stack([angle - FORK, angle + FORK])
    lengths, bases = np.stack([length, length]), np.stack([base, base])
    lines = np.stack([bases, bases + step(angles, lengths)], axis=-2)
    return lines.reshape(-1, 2, 2), angles.ravel(), lengths.ravel()


def step(angle: NDArray[np.float64], length: NDArray[np.float64]) -> NDArray[np.float64]:
    return length[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def drawn(height: int, width: int, lots: list[tuple[NDArray[np.float64], float]]) -> NDArray[np.float64]:
    """The lines on a pane of height x width, from 0 to 1."""
    canvas = Image.new("L", (FINENESS * width, FINENESS * height))
    pen, scale = ImageDraw.Draw(canvas), FINENESS * max(height, width)
    for lines, brightness in lots:
        for line in (lines * scale).reshape(-1, 4).tolist():
            pen.line(line, fill=round(255 * brightness), width=FINENESS if brightness == 1 else 1)
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX)) / 255
