"""MeZO's draw of examples: rows of a split in the order of numpy's legacy generator (protocols 1.2)."""

from __future__ import annotations

import numpy as np


def permutation(count: int, seed: int) -> list[int]:
    """The numbers below `count` in the order that `np.random.seed(seed)` gives, without the global generator."""
    return np.random.RandomState(seed).permutation(count).tolist()


def draw_training(count: int, train: int, dev: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows for selection, out of `count`; where there are too few, `dev` keeps its size."""
    drawn = permutation(count, seed)[: train + dev]
    return drawn[:-dev], drawn[-dev:]


def draw_test(count: int, test: int, seed: int) -> list[int]:
    """Rows to test on, out of the `count` of another split."""
    return permutation(count, seed)[:test]
