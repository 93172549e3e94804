"""Kept-weight counts: exact on decimal sparsities, ties as documented, errors that name what is wrong."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from typing import Any

import pytest

from sparsekern.distributions import check_sparsity, global_budget, keep_count, uniform

SIZES = {"conv1": 9_408, "layer1.conv1": 4_096, "layer1.conv2": 36_864, "fc": 2_048_000}


@pytest.mark.parametrize(
    ("n", "sparsity", "kept"),
    [
        (100, 0.95, 5),
        (10, 0.5, 5),
        (10, 0.7, 3),
        (10, 0.8, 2),
        (10, 0.9, 1),
        (0, 0.95, 0),
        (1, 0.95, 0),
        (7, 0, 7),
        (7, 0.0, 7),
        (7, 1, 0),
        (7, 1.0, 0),
        (1_000, 1e-05, 1_000),
        (25_502_912, 0.95, 1_275_146),
        (23_445_504, 0.98, 468_910),
    ],
)
def test_keep_count_known_values(n: int, sparsity: float, kept: int) -> None:
    assert keep_count(n, sparsity) == kept


@pytest.mark.parametrize(("n", "kept"), [(1, 1), (3, 1), (5, 3), (7, 3), (9, 5)])
def test_keep_count_rounds_halves_to_an_even_pruned_count(n: int, kept: int) -> None:
    assert keep_count(n, 0.5) == kept
    assert (n - kept) % 2 == 0


def test_keep_count_ties_are_found_where_float_products_miss_them() -> None:
    # Where the decimal product ends in exactly one half, the float product may lie beside it.
    missed = 0
    for text in ("0.55", "0.95", "0.965", "0.98", "0.99", "0.995", "0.145", "0.285", "0.29", "0.575"):
        for n in range(1, 3000):
            pruned = int((Decimal(text) * n).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))
            assert keep_count(n, float(text)) == n - pruned, (n, text)
            missed += round(n * float(text)) != pruned
    assert missed > 0, "no case here tells exact from float arithmetic; the test shows nothing"


def test_keep_count_is_exact_beyond_the_range_of_doubles() -> None:
    n = 10**18
    assert keep_count(n, 0.95) == 5 * 10**16
    assert keep_count(n + 20, 0.95) == 5 * 10**16 + 1


def test_keep_count_takes_fractions_exactly() -> None:
    assert keep_count(9, Fraction(1, 3)) == 6
    assert check_sparsity(0.95) == Fraction(19, 20)


def test_keep_count_never_grows_with_sparsity() -> None:
    counts = [keep_count(997, step / 1000) for step in range(1001)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 997 and counts[-1] == 0


@pytest.mark.parametrize("value", [-0.1, 1.0001, 95, float("nan"), float("inf")])
def test_sparsity_out_of_range_is_named(value: float) -> None:
    for call in (lambda: keep_count(10, value), lambda: uniform(SIZES, value), lambda: global_budget(SIZES, value)):
        with pytest.raises(ValueError, match=r"sparsity must be .*0.*1.*got") as error:
            call()
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", ["0.9", None, True, 1j])
def test_sparsity_of_wrong_type_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="sparsity must be a number from 0 to 1, got"):
        keep_count(10, value)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="n must be 0 or more weights, got -1"):
        keep_count(-1, 0.5)
    with pytest.raises(TypeError, match=r"n must be a whole number of weights, got 10\.0"):
        keep_count(10.0, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sizes\['fc'\] must be 0 or more weights, got -3"):
        uniform({"fc": -3}, 0.5)
    with pytest.raises(TypeError, match=r"sizes\['fc'\] must be a whole number"):
        global_budget({"fc": 1.5}, 0.5)  # type: ignore[dict-item]


def test_uniform_keeps_the_same_share_of_every_layer_in_order() -> None:
    counts = uniform(SIZES, 0.95)
    assert list(counts) == list(SIZES)
    assert counts == {"conv1": 470, "layer1.conv1": 205, "layer1.conv2": 1_843, "fc": 102_400}


def test_uniform_leaves_dense_layers_whole_without_compensation() -> None:
    counts = uniform(SIZES, 0.95, dense=("conv1", "fc"))
    assert counts == {"conv1": 9_408, "layer1.conv1": 205, "layer1.conv2": 1_843, "fc": 2_048_000}
    assert uniform(SIZES, 0.95, dense=(name for name in ("conv1", "fc"))) == counts


def test_uniform_of_nothing_is_nothing() -> None:
    assert uniform({}, 0.9) == {}
    assert global_budget({}, 0.9) == 0


def test_uniform_refuses_unknown_dense_names() -> None:
    with pytest.raises(ValueError, match=r"dense names layers that are not in sizes: \['classifier'\]; allowed are"):
        uniform(SIZES, 0.9, dense=["classifier", "fc"])


def test_uniform_refuses_a_lone_string_even_if_its_letters_are_layers() -> None:
    with pytest.raises(TypeError, match="dense must be a collection of layer names, got the single string 'fc'"):
        uniform({"f": 10, "c": 10, "fc": 10}, 0.9, dense="fc")


def test_global_budget_rounds_once_on_the_total() -> None:
    sizes = {name: 14 for name in "abcdefghij"}
    assert global_budget(sizes, 0.9) == 14
    # Each layer alone rounds 12.6 pruned up to 13, so the layer counts add up to another number.
    assert sum(uniform(sizes, 0.9).values()) == 10


def test_global_budget_equals_the_count_of_one_layer_of_that_size() -> None:
    assert global_budget(SIZES, 0.98) == keep_count(sum(SIZES.values()), 0.98)
