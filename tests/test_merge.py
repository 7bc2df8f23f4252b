"""Merging against plain loops and dense float64, for every slicing; and what a bfloat16 weight keeps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference
import torch
from test_experts import random_pair

from lorasc_ds.algorithm import merge
from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.merge import Edit
from lorasc_ds.algorithm.noise import Purpose, Stream


def weight(out: int = 301, in_: int = 211) -> torch.Tensor:
    return torch.randn(out * in_, generator=torch.Generator().manual_seed(5)) * 0.02


def add_(accumulator: torch.Tensor, start: int = 0, **what: Any) -> None:
    merge.edit_([Edit(accumulator, accumulator, start, **what)])


@pytest.mark.parametrize("rank", [1, 8])
def test_delta_agrees_with_a_plain_loop_in_every_slicing(rank: int) -> None:
    pair, base = random_pair(301, 211, rank), weight()
    expected = reference.add(base.view(301, 211).numpy(), reference.delta(pair.A.numpy(), pair.B.numpy(), 0.7))
    cuts_of = {1: [], 2: [31_756], 3: [211, 40_000], 6: [1, 2, 210, 212, 63_000]}
    for cuts in cuts_of.values():
        edges = [0, *cuts, len(base)]
        sliced = base.clone()
        for start, stop in pairwise(edges):
            add_(sliced[start:stop], start, pair=pair, scaling=0.7)
        assert np.array_equal(sliced.view(301, 211).numpy(), expected)


def test_delta_is_within_one_rounding_of_dense_float64() -> None:
    pair = random_pair(301, 211, 8)
    got = torch.zeros(301 * 211)
    add_(got, pair=pair, scaling=0.7)
    exact = 0.7 * pair.B.double() @ pair.A.double()
    assert torch.all((got.view(301, 211).double() - exact).abs() <= exact.abs() * 2**-24 * (1 + 1e-6) + 1e-14)


def test_delta_is_added_even_where_it_is_zero() -> None:
    """-0.0 + 0.0 is +0.0: leaving a zero delta out would give other bits."""
    minus_zero = torch.full((6,), -0.0)
    add_(minus_zero, pair=Pair(torch.zeros(1, 3), torch.zeros(2, 1)))
    assert not torch.signbit(minus_zero).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closing_virtual_closing_and_undoing_agree(dtype: torch.dtype) -> None:
    pair = random_pair(301, 211, 4)
    storage = weight().to(dtype)
    accumulator = storage if dtype == torch.float32 else storage.float()
    before = storage.clone()
    merge.edit_([Edit(storage, accumulator, pair=pair, scaling=0.01)], virtual=True)
    virtual = storage.clone()
    merge.round_into_(storage, before if dtype == torch.float32 else accumulator)
    assert torch.equal(storage, before)
    squares = merge.edit_([Edit(storage, accumulator, pair=pair, scaling=0.01)])
    assert torch.equal(storage, virtual)
    assert torch.equal(storage, accumulator.to(dtype))
    change = reference.delta(pair.A.numpy(), pair.B.numpy(), 0.01).ravel().astype(np.float64)
    shown = (storage.float() - before.float()).double().numpy()
    assert squares[0] == pytest.approx((change**2).sum(), rel=1e-9)
    assert squares[1] == pytest.approx(((change - shown) ** 2).sum(), rel=1e-5)


def test_one_to_four_threads_give_the_same_bits() -> None:
    """A weight that is large enough for torch to share its rounding and sums among threads."""
    pair = random_pair(2048, 512, 4)
    before = torch.get_num_threads()
    merged = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            storage = weight(2048, 512).bfloat16()
            accumulator = storage.float()
            merge.edit_([Edit(storage, accumulator, pair=pair, scaling=0.01)])
            merged.append((storage, accumulator))
    finally:
        torch.set_num_threads(before)
    for storage, accumulator in merged[1:]:
        assert torch.equal(storage, merged[0][0])
        assert torch.equal(accumulator, merged[0][1])


def test_ten_small_experts_survive_bfloat16() -> None:
    """delta/W of 0.3 %: the error against the exact sum is that of one rounding; bf16 `+=` loses much more."""
    out, in_ = 256, 192
    generator = torch.Generator().manual_seed(1)
    start = (torch.randn(out * in_, generator=generator) * 0.02).bfloat16()
    storage, accumulator, naive = start.clone(), start.float(), start.clone()
    exact = start.double()
    for index in range(10):
        pair = random_pair(out, in_, 8, seed=index)
        s = 0.003 * 0.02 / np.sqrt(8)
        merge.edit_([Edit(storage, accumulator, pair=pair, scaling=s)])
        exact += (s * pair.B.double() @ pair.A.double()).view(-1)
        naive += (s * pair.B @ pair.A).view(-1)
    one_rounding = exact.to(torch.bfloat16).double() - exact
    error = storage.double() - exact
    assert error.norm() <= one_rounding.norm() * (1 + 1e-4)  # the float32 sums add 2**-16 of it
    total = (exact - start.double()).norm()
    assert error.norm() / total < 0.2
    assert (naive.double() - exact).norm() / total > 0.4


def test_noise_and_experts_agree_with_plain_loops_over_three_boundaries() -> None:
    out, in_, s = 12, 10, 2.0
    accumulator = weight(out, in_)[: out * in_].clone()
    expected = accumulator.view(out, in_).numpy().copy()
    for expert in (1, 2, 3):
        pair = random_pair(out, in_, 2, seed=expert)
        add_(accumulator, stream=Stream(7, expert, 4, Purpose.NOISE), noise_scale=0.013)
        add_(accumulator, pair=pair, scaling=s)
        c = float(np.float32(0.013))
        expected = reference.add(expected, reference.noise((out, in_), c, 4, expert, 7))
        expected = reference.add(expected, reference.delta(pair.A.numpy(), pair.B.numpy(), s))
    assert np.array_equal(accumulator.view(out, in_).numpy(), expected)
