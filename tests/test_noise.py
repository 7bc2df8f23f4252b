"""Philox against the known answers of Random123 and a plain loop; the noise's moments; slices and threads."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch

from lorasc_ds.algorithm.merge import Edit, edit_, edit_eagerly_
from lorasc_ds.algorithm.noise import Purpose, Stream, philox_4x32, uniform, words

STREAM = Stream(seed=2**40 + 17, expert=3, weight=5, purpose=Purpose.NOISE)


def add_noise_(weight: torch.Tensor, start: int = 0, c: float = 0.1) -> None:
    edit_([Edit(weight, weight, start, stream=STREAM, noise_scale=c)])


KNOWN_ANSWERS = [  # Random123, kat_vectors, philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    drawn = philox_4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in drawn) == expected


@pytest.mark.parametrize("start", [0, 3, 2**34 - 2])  # the last one carries into the counter's second word
def test_words_agree_with_a_plain_loop(start: int) -> None:
    expected = [reference.philox_word(e, 5, 3, 0, STREAM.seed) for e in range(start, start + 11)]
    assert words(STREAM, start, start + 11).tolist() == expected


def test_streams_differ_in_every_part() -> None:
    streams = [
        STREAM,
        Stream(18, 3, 5, Purpose.NOISE),
        Stream(STREAM.seed, 4, 5, Purpose.NOISE),
        Stream(STREAM.seed, 3, 6, Purpose.NOISE),
        Stream(STREAM.seed, 3, 5, Purpose.FRESH_A),
    ]
    assert len({tuple(uniform(stream, 0, 8).tolist()) for stream in streams}) == len(streams)


def test_noise_has_the_moments_of_its_law() -> None:
    """Uniform in ±c/2: mean 0, variance c²/12; with n draws the mean is within 5 of its standard errors."""
    n, c = 1_000_000, 0.25
    noise = torch.zeros(n)
    add_noise_(noise, c=c)
    values = noise.double()
    assert values.min() >= -c / 2
    assert values.max() < c / 2
    assert values.min() < -0.499 * c
    assert values.max() > 0.499 * c
    assert abs(values.mean()) < 5 * c / np.sqrt(12 * n)
    assert values.var() == pytest.approx(c * c / 12, rel=0.005)


def test_every_slicing_gives_the_same_bits() -> None:
    rng = np.random.default_rng(0)
    size = 70_001  # more than one chunk, and no multiple of four
    whole = torch.randn(size, generator=torch.Generator().manual_seed(0))
    base = whole.clone()
    add_noise_(whole)
    for pieces in (2, 3, 7, 40):
        cuts = [0, *sorted(rng.choice(size, pieces - 1, replace=False).tolist()), size]
        parts = base.clone()
        for start, stop in pairwise(cuts):
            add_noise_(parts[start:stop], start)
        assert torch.equal(parts, whole)


def test_one_to_four_threads_give_the_same_bits() -> None:
    before = torch.get_num_threads()
    drawn = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            drawn.append(uniform(STREAM, 0, 100_000))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_a_4096_square_is_drawn_well_under_three_seconds() -> None:
    """In eager torch, where there is no compiler: about 0.45 s; the processor's time, for a machine may be busy."""
    weight = torch.zeros(4096 * 4096)
    began = time.process_time()
    edit_eagerly_([Edit(weight, weight, stream=STREAM, noise_scale=0.1)])
    assert time.process_time() - began < 2.0


def test_no_noise_writes_nothing() -> None:
    weight = torch.full((8,), -0.0)
    add_noise_(weight, c=0.0)
    assert torch.signbit(weight).all()
