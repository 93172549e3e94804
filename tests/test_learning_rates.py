"""Learning-rate shapes against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from sparsekern.learning_rates import constant_lr, cosine_lr, linear_lr

LR = Callable[..., float]


@pytest.mark.parametrize("schedule", [linear_lr, cosine_lr, constant_lr])
def test_warm_up_is_linear_and_ends_at_the_full_rate(schedule: LR) -> None:
    assert [schedule(step, total_steps=100, warmup_steps=5) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert schedule(0, total_steps=100) == 1.0


@pytest.mark.parametrize("schedule", [linear_lr, cosine_lr, constant_lr])
@pytest.mark.parametrize("warmup", [0, 1, 7, 50])
def test_multipliers_stay_in_range_and_never_rise_after_the_warm_up(schedule: LR, warmup: int) -> None:
    values = [schedule(step, total_steps=50, warmup_steps=warmup) for step in range(60)]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert all(value > 0.0 for value in values[:50]), "a step of the run has no learning rate"
    assert values[warmup:] == sorted(values[warmup:], reverse=True)


def test_decay_shapes() -> None:
    steps = (10, 35, 60, 85, 110, 500)
    linear = [linear_lr(step, total_steps=110, warmup_steps=10) for step in steps]
    cosine = [cosine_lr(step, total_steps=110, warmup_steps=10) for step in steps]
    constant = [constant_lr(step, total_steps=110, warmup_steps=10) for step in steps]
    assert linear == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    half = math.sqrt(0.5) / 2
    assert cosine == pytest.approx([1.0, 0.5 + half, 0.5, 0.5 - half, 0.0, 0.0])
    assert constant == [1.0] * 6


@pytest.mark.parametrize("schedule", [linear_lr, cosine_lr, constant_lr])
@pytest.mark.parametrize(
    ("step", "total", "warmup", "error", "message"),
    [
        (-1, 10, 0, ValueError, "step must be a whole number of at least 0, got -1"),
        (0, 0, 0, ValueError, "total_steps must be a whole number of at least 1, got 0"),
        (0, 10, -1, ValueError, "warmup_steps must be a whole number of at least 0, got -1"),
        (0, 10, 11, ValueError, "warmup_steps must be at most total_steps=10, got 11"),
        (0.5, 10, 0, TypeError, r"step must be a whole number of at least 0, got 0\.5"),
    ],
)
def test_bad_learning_rate_arguments_are_named(
    schedule: LR, step: Any, total: int, warmup: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        schedule(step, total_steps=total, warmup_steps=warmup)
