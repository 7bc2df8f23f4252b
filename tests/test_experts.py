"""Fresh pairs, averages and statistics against plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from lorasc_ds.algorithm import experts
from lorasc_ds.algorithm.experts import Pair
from lorasc_ds.algorithm.noise import Purpose, Stream
from lorasc_ds.algorithm.restart import fresh_pairs


def random_pair(out: int, in_: int, rank: int, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(rank, in_, generator=generator), torch.randn(out, rank, generator=generator))


def dense(pair: Pair, s: float) -> torch.Tensor:
    return s * pair.B.double() @ pair.A.double()


def test_fresh_pair_is_drawn_as_written_down() -> None:
    pair = fresh_pairs([Stream(9, 2, 1, Purpose.FRESH_A)], [(6, 10)], [3])[0]
    assert np.array_equal(pair.A.numpy(), reference.fresh_A(3, 10, weight=1, expert=2, seed=9))
    assert pair.B.shape == (6, 3)
    assert not pair.B.any()


def test_fresh_pair_follows_kaiming_uniform() -> None:
    """kaiming_uniform(a=√5) is uniform in ±1/√in."""
    A = fresh_pairs([Stream(0, 1, 0, Purpose.FRESH_A)], [(4, 400)], [100])[0].A
    assert A.abs().max() <= 1 / 20
    assert A.abs().max() > 0.999 / 20
    assert A.double().var() == pytest.approx(1 / (3 * 400), rel=0.02)


@pytest.mark.parametrize("retention", [0.0, 0.5, 0.6, 0.8, 1 / 3])
def test_slow_update_rounds_once(retention: float) -> None:
    slow, fast = random_pair(7, 9, 4), random_pair(7, 9, 4, seed=1)
    (updated,) = experts.slow_updates([slow], [fast], retention)
    for new, old_slow, old_fast in zip(updated, slow, fast, strict=True):
        assert np.array_equal(new.numpy(), reference.average(old_slow.numpy(), old_fast.numpy(), retention))


PAIRS = {
    "random": random_pair(50, 70, 8),
    "rank-deficient": Pair(random_pair(50, 70, 8).A[[0, 0, 0, 1, 1, 2, 2, 2]], random_pair(50, 70, 8).B),
    "large mean": Pair(random_pair(50, 70, 8).A * 1e-3 + 10.0, random_pair(50, 70, 8).B * 1e-3 + 10.0),
    "one large entry": Pair(random_pair(50, 70, 1).A * 1e-6 + 1e3, torch.eye(50, 1) * 1e4),
}


@pytest.mark.parametrize("name", PAIRS)
def test_statistics_match_the_dense_matrix(name: str) -> None:
    pair, s = PAIRS[name], 0.5
    statistics = experts.delta_statistics([pair], [s])[0]
    matrix = dense(pair, s)
    assert statistics.mean == pytest.approx(float(matrix.mean()), rel=1e-9, abs=1e-12)
    assert statistics.std == pytest.approx(float(matrix.std(correction=0)), rel=1e-6)
    assert statistics.norm == pytest.approx(float(matrix.norm()), rel=1e-9)


def test_noise_scale_is_lambda_std_in_float32() -> None:
    pairs = [random_pair(20, 30, 4), random_pair(11, 30, 4), random_pair(20, 30, 4, seed=2)]  # two have one shape
    zero = Pair(pairs[0].A, torch.zeros_like(pairs[0].B))
    statistics = experts.delta_statistics([*pairs, zero], [2.0, 0.5, 1.0, 2.0])
    scales = [experts.noise_scale(of_one.std, 0.1) for of_one in statistics]
    of_pairs = zip(pairs, (2.0, 0.5, 1.0), strict=True)
    assert scales == [*(reference.noise_scale(pair.A.numpy(), pair.B.numpy(), s, 0.1) for pair, s in of_pairs), 0.0]


def test_inner_product_matches_the_dense_matrices() -> None:
    one, other = random_pair(20, 30, 4), random_pair(20, 30, 4, seed=1)
    expected = float((dense(one, 2.0) * dense(other, 2.0)).sum())
    assert experts.delta_inner_products([one], [other], [2.0]) == pytest.approx([expected], rel=1e-12)
