"""Phase schedules against the published AC/DC configurations."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest

from sparsekern.schedules import (
    AcdcSchedule,
    Dense,
    PhaseSchedule,
    PhaseSpan,
    Sparse,
    acdc_schedule,
)

LENGTHS = (5, 20, 24, 36, 40, 88, 100, 105, 150, 200, 1000)


def starts(schedule: AcdcSchedule, kind: str) -> list[Fraction]:
    return [start for start, this in schedule.phase_list() if this == kind]


def dense_steps(schedule: PhaseSchedule) -> int:
    return sum(span.steps for span in schedule.phases if isinstance(span.phase, Dense))


def test_100_epochs_is_the_published_list() -> None:
    schedule = acdc_schedule(100)
    assert starts(schedule, "S") == [10, 20, 30, 40, 50, 60, 70, 85]
    assert starts(schedule, "D") == [0, 15, 25, 35, 45, 55, 65, 75]


def test_150_epochs_is_the_published_list() -> None:
    schedule = acdc_schedule(150)
    assert starts(schedule, "S") == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 135]
    assert starts(schedule, "D") == [0, 15, 25, 35, 45, 55, 65, 75, 85, 95, 105, 115, 125]


def test_200_epochs_is_the_published_list() -> None:
    schedule = acdc_schedule(200)
    assert starts(schedule, "S") == [*range(10, 171, 10), 185]
    assert starts(schedule, "D") == [0, *range(15, 176, 10)]


@pytest.mark.parametrize("epochs", [100, 150, 200, 250, 500, 1000])
def test_half_of_the_epochs_are_dense(epochs: int) -> None:
    resolved = acdc_schedule(epochs).resolve(7, 0.9)
    assert dense_steps(resolved) * 2 == resolved.total_steps == epochs * 7


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (40, [(0, "D"), (10, "S"), (15, "D"), (25, "S")]),
        # The remainder of 9 epochs goes to the last dense phase.
        (49, [(0, "D"), (10, "S"), (15, "D"), (34, "S")]),
        (50, [(0, "D"), (10, "S"), (15, "D"), (20, "S"), (25, "D"), (35, "S")]),
    ],
)
def test_shortest_reference_runs(epochs: int, expected: list[tuple[int, str]]) -> None:
    assert acdc_schedule(epochs).phase_list() == expected


def test_a_remainder_lengthens_the_last_dense_phase() -> None:
    assert acdc_schedule(88).phase_list()[-3:] == [(50, "S"), (55, "D"), (73, "S")]
    assert acdc_schedule(105).phase_list()[-3:] == [(70, "S"), (75, "D"), (90, "S")]
    assert acdc_schedule(40.5).phase_list()[-2:] == [(15, "D"), (Fraction(51, 2), "S")]


@pytest.mark.parametrize("epochs", [5, 20, 24, 36, 39.5])
def test_below_40_epochs_the_100_epoch_list_is_scaled(epochs: float) -> None:
    expected = [(start * Fraction(epochs) / 100, kind) for start, kind in acdc_schedule(100).phase_list()]
    assert acdc_schedule(epochs).phase_list() == expected
    assert len(expected) == 16


def test_20_epochs_in_steps() -> None:
    # 100-epoch edges times 20 / 100 * 10 steps.
    assert acdc_schedule(20).resolve(10, 0.9).edges == tuple(
        2 * epoch for epoch in (10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 85)
    )


@pytest.mark.parametrize("epochs", [e for e in LENGTHS if e >= 40])
def test_reference_phase_lengths(epochs: int) -> None:
    plan = acdc_schedule(epochs).phase_list()
    edges = [start for start, _ in plan] + [Fraction(epochs)]
    lengths = [stop - start for start, stop in zip(edges, edges[1:], strict=False)]
    assert lengths[0] == 10
    assert set(lengths[1:-2]) == {5}
    assert 10 <= lengths[-2] < 20
    assert lengths[-1] == 15


@pytest.mark.parametrize("rule", ["reference", "proportional", "sparseml"])
@pytest.mark.parametrize("steps_per_epoch", [1, 2, 3, 7, 10, 196, 1251])
@pytest.mark.parametrize("epochs", LENGTHS)
def test_every_schedule_is_a_clean_alternation(epochs: int, steps_per_epoch: int, rule: Any) -> None:
    # The default 5-epoch phases of sparseml's rule do not fit into the shortest run.
    options: dict[str, Any] = {"start": 1, "freq": 1} if rule == "sparseml" and epochs < 20 else {}
    resolved = acdc_schedule(epochs, rule=rule, **options).resolve(steps_per_epoch, 0.95)
    assert resolved.total_steps == epochs * steps_per_epoch
    assert resolved.phases[0].start == 0
    assert all(left.stop == right.start for left, right in zip(resolved.phases, resolved.phases[1:], strict=False))
    assert all(span.steps > 0 for span in resolved.phases)
    # Dense first, sparse last, and never the same kind twice in a row.
    assert [span.phase for span in resolved.phases] == [Dense(), Sparse(0.95)] * (len(resolved.phases) // 2)
    assert resolved.at(0) == Dense()
    assert resolved.at(resolved.total_steps - 1) == Sparse(0.95)


@pytest.mark.parametrize("epochs", LENGTHS)
def test_steps_follow_the_epoch_list(epochs: int) -> None:
    schedule = acdc_schedule(epochs)
    resolved = schedule.resolve(1000, 0.9)
    assert [(span.start, isinstance(span.phase, Sparse)) for span in resolved.phases] == [
        (start * 1000, kind == "S") for start, kind in schedule.phase_list()
    ]


def test_edges_round_to_whole_steps_halves_upwards_and_coinciding_ones_drop() -> None:
    # In steps, the edges are .5 .75 1 1.25 1.5 1.75 2 2.25 2.5 2.75 3 3.25 3.5 3.75 4.25: at 1, 2 and 3 a sparse phase
    # begins and ends at once, at 4 the last sparse phase is what is left.
    assert acdc_schedule(5).resolve(1, 0.9).phases == (PhaseSpan(0, 4, Dense()), PhaseSpan(4, 5, Sparse(0.9)))
    # Rounding halves to even would put the first edge (2.5 steps) at 2.
    assert acdc_schedule(25).resolve(1, 0.9).edges[0] == 3


def test_two_steps_are_enough_and_one_is_not() -> None:
    assert acdc_schedule(2).resolve(1, 0.9).phases == (PhaseSpan(0, 1, Dense()), PhaseSpan(1, 2, Sparse(0.9)))
    with pytest.raises(ValueError, match=r"epochs \* steps_per_epoch must be at least 2 steps.*epochs=1 .*epoch=1"):
        acdc_schedule(1).resolve(1, 0.9)


def test_proportional_scales_at_any_length() -> None:
    long = acdc_schedule(1000, rule="proportional")
    assert starts(long, "S") == [100, 200, 300, 400, 500, 600, 700, 850]
    assert starts(long, "D") == [0, 150, 250, 350, 450, 550, 650, 750]
    assert acdc_schedule(100, rule="proportional").phase_list() == acdc_schedule(100).phase_list()
    assert len(acdc_schedule(1000).phase_list()) > len(long.phase_list())


@pytest.mark.parametrize(
    ("epochs", "start", "end", "freq"),
    [(100, 5, 100, 5), (100, 5, 75, 5), (100, 5, 85, 5), (90, 0, 83, 7), (50, 10, 20, 5), (30, 3, 29, 4)],
)
def test_sparseml_rule_agrees_with_its_formula(epochs: int, start: int, end: int, freq: int) -> None:
    resolved = acdc_schedule(epochs, rule="sparseml", start=start, end=end, freq=freq).resolve(1, 0.9)
    for epoch in range(epochs):
        sparse = epoch >= end - freq or (epoch >= start and (epoch - start) // freq % 2 == 1)
        assert resolved.at(epoch) == (Sparse(0.9) if sparse else Dense()), epoch


def test_sparseml_defaults_begin_like_the_reference() -> None:
    schedule = acdc_schedule(100, rule="sparseml")
    assert (schedule.start, schedule.end, schedule.freq) == (5, 100, 5)
    assert schedule.phase_list()[:12] == acdc_schedule(100).phase_list()[:12]
    assert schedule.phase_list()[-2:] == [(85, "D"), (90, "S")]


def test_at_switches_exactly_on_the_edge_and_stays_at_the_end() -> None:
    resolved = acdc_schedule(100).resolve(10, 0.95)
    assert resolved.edges[:3] == (100, 150, 200)
    assert [resolved.at(step) for step in (99, 100, 149, 150)] == [Dense(), Sparse(0.95), Sparse(0.95), Dense()]
    assert resolved.at(1000) == resolved.at(10**9) == Sparse(0.95)
    for span in resolved.phases:
        assert all(resolved.at(step) is span.phase for step in range(span.start, span.stop))
    with pytest.raises(ValueError, match="step must be a whole number of at least 0, got -1"):
        resolved.at(-1)
    with pytest.raises(TypeError, match=r"step must be a whole number of at least 0, got 1\.0"):
        resolved.at(1.0)  # type: ignore[arg-type]


def test_sparsity_comes_from_either_place_but_not_from_two() -> None:
    carried = acdc_schedule(100, sparsity=0.9)
    assert carried.resolve(10).phases[-1].phase == Sparse(0.9)
    assert carried.resolve(10, 0.9) == carried.resolve(10)
    with pytest.raises(ValueError, match=r"sparsity must be given once or agree, got sparsity=0\.95 here and 0\.9"):
        carried.resolve(10, 0.95)
    with pytest.raises(ValueError, match="sparsity must be .* got None in both"):
        acdc_schedule(100).resolve(10)
    with pytest.raises(ValueError, match=r"sparsity must be .*got 1\.5"):
        acdc_schedule(100).resolve(10, 1.5)
    with pytest.raises(ValueError, match=r"sparsity must be .*got -1"):
        acdc_schedule(100, sparsity=-1)


def test_timeline_shows_every_phase_and_the_totals() -> None:
    lines = acdc_schedule(40).resolve(10, 0.955).timeline().splitlines()
    assert [line.split() for line in lines] == [
        ["#", "phase", "first", "step", "last", "step", "steps"],
        ["1", "dense", "0", "99", "100"],
        ["2", "sparse", "95.5%", "100", "149", "50"],
        ["3", "dense", "150", "249", "100"],
        ["4", "sparse", "95.5%", "250", "399", "150"],
        ["4", "phases,", "400", "steps,", "200", "of", "them", "dense", "(50.0%)"],
    ]
    assert len({len(line) for line in lines[:-1]}) == 1, "the columns do not line up"


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.95, 1, 1.0])
def test_sparse_accepts_the_closed_range(sparsity: float) -> None:
    assert Sparse(sparsity).sparsity == sparsity


@pytest.mark.parametrize("sparsity", [-0.01, 1.01, 95, float("nan")])
def test_sparse_refuses_the_rest(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be a number from 0 .* to 1 .*got") as error:
        Sparse(sparsity)
    assert repr(sparsity) in str(error.value)


def test_values_are_frozen_and_compare_by_content() -> None:
    assert Dense() == Dense() and Sparse(0.9) == Sparse(0.9) != Sparse(0.8)
    assert hash(acdc_schedule(100).resolve(3, 0.9)) == hash(acdc_schedule(100).resolve(3, 0.9))
    for value, name in ((Sparse(0.9), "sparsity"), (acdc_schedule(5), "epochs"), (PhaseSpan(0, 1, Dense()), "stop")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1)


def test_phase_schedule_refuses_gaps_overlaps_and_nothing() -> None:
    first = PhaseSpan(0, 10, Dense())
    for second in (PhaseSpan(11, 20, Sparse(0.9)), PhaseSpan(9, 20, Sparse(0.9))):
        with pytest.raises(ValueError, match=r"phases\[1\] must start at step 10, got start="):
            PhaseSchedule((first, second))
    with pytest.raises(ValueError, match=r"phases\[0\] must start at step 0, got start=1"):
        PhaseSchedule((PhaseSpan(1, 2, Dense()),))
    with pytest.raises(ValueError, match="phases must hold at least one"):
        PhaseSchedule(())
    with pytest.raises(TypeError, match="phases must be a tuple of PhaseSpan, got list"):
        PhaseSchedule([first])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stop must be greater than start, got start=3 and stop=3"):
        PhaseSpan(3, 3, Dense())
    with pytest.raises(TypeError, match=r"phase must be Dense\(\) or Sparse\(sparsity\), got 'S'"):
        PhaseSpan(0, 3, "S")  # type: ignore[arg-type]


@pytest.mark.parametrize("epochs", [0, -5, float("nan"), float("inf")])
def test_bad_epochs_are_named(epochs: float) -> None:
    with pytest.raises(ValueError, match="epochs must be a finite number greater than 0, got"):
        acdc_schedule(epochs)


@pytest.mark.parametrize("epochs", ["100", None, True])
def test_epochs_of_wrong_type_are_named(epochs: Any) -> None:
    with pytest.raises(TypeError, match="epochs must be a number greater than 0, got"):
        acdc_schedule(epochs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rule": "paper"}, ValueError, r"rule must be one of \['reference', 'sparseml', .*\], got 'paper'"),
        ({"start": 5}, ValueError, "start must be left out unless rule='sparseml', got start=5"),
        ({"rule": "proportional", "freq": 5}, ValueError, "freq must be left out unless rule='sparseml'"),
        ({"rule": "sparseml", "freq": 0}, ValueError, "freq must be a whole number of at least 1, got 0"),
        ({"rule": "sparseml", "freq": 2.5}, TypeError, r"freq must be a whole number of at least 1, got 2\.5"),
        ({"rule": "sparseml", "start": -1}, ValueError, "start must be a whole number of at least 0, got -1"),
        ({"rule": "sparseml", "end": 101}, ValueError, "end must be at most epochs, got end=101 and epochs=100"),
        ({"rule": "sparseml", "end": 14}, ValueError, r"end must be at least start \+ 2 \* freq = 15.*got end=14"),
    ],
)
def test_bad_rules_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        acdc_schedule(100, **arguments)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-3, ValueError), (2.5, TypeError), (None, TypeError)])
def test_bad_steps_per_epoch_is_named(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="steps_per_epoch must be a whole number of at least 1, got"):
        acdc_schedule(100).resolve(value, 0.9)
