"""Update intervals and curves against values worked out by hand."""

import pytest

import sparsekern as sk
from sparsekern.phases import PhaseSchedule, PhaseSpan
from sparsekern.updates import UpdateSchedule, cosine, cubic, rising_phases, update_schedule


def test_counts_and_steps():
    schedule = UpdateSchedule(start=3, stop=10, every=3, total_steps=12)
    assert [schedule.count(t) for t in range(13)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert [schedule.last(t) for t in (2, 3, 5, 9, 12)] == [None, 3, 3, 9, 9]
    assert schedule.timeline() == "3 mask updates: every 3 steps from step 3 to 9 of 12"


def test_shares_of_a_run():
    plan = update_schedule(epochs=100, start=10 / 32, stop=25 / 32, every=1 / 32)
    assert plan.resolve(320) == UpdateSchedule(10_000, 25_000, 1_000, 32_000)
    filled = update_schedule(total_steps=32_000, every=50).with_defaults(None, 25 / 32, 100)
    assert filled.resolve(None) == UpdateSchedule(50, 25_000, 50, 32_000)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: update_schedule(), "epochs or total_steps must be given"),
        (lambda: update_schedule(1, total_steps=2), "epochs or total_steps must be given"),
        (lambda: update_schedule(0), "epochs must be greater than 0"),
        (lambda: update_schedule(1, every=1.5), "every must be a share"),
        (lambda: update_schedule(1, start=0.5, stop=0.4), "stop must be at least start"),
        (lambda: update_schedule(1, stop=2), "stop must be a number from 0"),
        (lambda: update_schedule(1, stop=1, every=1).resolve(None), "steps_per_epoch must be given"),
        (lambda: update_schedule(1).resolve(3), "stop and every must be given"),
        (lambda: UpdateSchedule(4, 3, 1, 5), "must not decrease"),
        (lambda: UpdateSchedule(0, 3, 0, 5), "every must be at least 1"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_cubic():
    values = [round(cubic(x, 0.0, 0.9), 5) for x in (-1, 0, 0.25, 0.5, 0.75, 1, 2)]
    assert values == [0, 0, 0.52031, 0.7875, 0.88594, 0.9, 0.9]


def test_cosine():
    assert [round(cosine(x, 0.3), 5) for x in (0, 0.25, 0.5, 0.75, 1, 2)] == [0.3, 0.25607, 0.15, 0.04393, 0, 0]
    assert cosine(1, 0.5, 0.005) == pytest.approx(0.005)


def alternating(count):
    kinds = [sk.Dense(), sk.Sparse(0.99)] * count
    return PhaseSchedule(tuple(PhaseSpan(2 * i, 2 * i + 2, kind) for i, kind in enumerate(kinds)))


@pytest.mark.parametrize(
    ("count", "rising"),
    [(1, [0.99]), (2, [0.99, 0.99]), (3, [0.9, 0.99, 0.99]), (5, [0.9, 0.93, 0.96, 0.99, 0.99])],
)
def test_rising_phases_reach_the_target_in_the_last_but_one(count, rising):
    risen = rising_phases(alternating(count), 0.9)
    assert [s.phase.sparsity for s in risen.phases if isinstance(s.phase, sk.Sparse)] == rising
    assert risen.edges == alternating(count).edges
    with pytest.raises(ValueError, match=r"first must be at most the sparsity 0\.99"):
        rising_phases(alternating(count), 0.995)
