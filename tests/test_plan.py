"""Boundaries and learning rates against the formulas as the paper and the design write them."""

from __future__ import annotations

import math

import pytest

from lorasc_ds.algorithm.plan import Expert, Plan, compressed_warmup, learning_rate_factor


@pytest.mark.parametrize(("steps", "experts"), [(1250, 5), (1250, 2), (1250, 1250), (1250, 1), (7, 3), (11, 4)])
def test_experts_tile_the_run(steps: int, experts: int) -> None:
    planned = list(Plan(steps, experts))
    assert [expert.index for expert in planned] == list(range(1, experts + 1))
    assert [expert.stop for expert in planned] == [math.floor(k * steps / experts) for k in range(1, experts + 1)]
    assert [step for expert in planned for step in range(expert.start, expert.stop)] == list(range(steps))
    assert all(expert.steps >= 1 for expert in planned)


def test_two_experts_in_five_epochs_close_at_half_an_epoch() -> None:
    assert list(Plan(1250, 2)) == [Expert(1, 0, 625), Expert(2, 625, 1250)]


@pytest.mark.parametrize("experts", [0, 8])
def test_impossible_numbers_of_experts_are_refused(experts: int) -> None:
    with pytest.raises(ValueError, match=f"got {experts}"):
        Plan(7, experts)


def test_linear_schedule_is_the_one_of_transformers() -> None:
    """Without warm-up: (n-i)/n, from 1 to 1/n."""
    assert [learning_rate_factor("linear", i, 4) for i in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_cosine_and_constant() -> None:
    assert [learning_rate_factor("cosine", i, 4) for i in range(4)] == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    assert {learning_rate_factor("constant", i, 4) for i in range(4)} == {1.0}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_rises_to_the_peak_and_no_step_is_lost(schedule: str) -> None:
    factors = [learning_rate_factor(schedule, i, 10, warmup_steps=4) for i in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert learning_rate_factor(schedule, 3, 4, warmup_steps=4) == 1.0  # nothing but warm-up


def test_warm_up_is_compressed_and_rounded_up() -> None:
    """The Alpaca protocol: 100 of the run's steps over 3 one-epoch experts are 34 each."""
    assert compressed_warmup(100, 388, 1164) == 34
    assert compressed_warmup(0, 388, 1164) == 0
