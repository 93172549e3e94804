"""Erdos-Renyi-Kernel: the densities of ResNet-50 and the exact budget."""

import math

import pytest

from benchmarks.networks import resnet50_convs
from sparsekern.distributions import erk, global_budget

SHAPES = {c.name.removeprefix("resnet50/"): c.weight_shape for c in resnet50_convs()} | {"fc": (1000, 2048)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}


def test_resnet50_has_its_published_sizes():
    assert len(SIZES) == 54 and sum(SIZES.values()) == 25_502_912
    assert sum(SIZES.values()) - SIZES["conv1"] - SIZES["fc"] == 23_445_504


def test_resnet50_at_90_percent():
    kept = erk(SHAPES, 0.9)
    sparsity = {name: 1 - kept[name] / SIZES[name] for name in kept}
    assert [name for name, count in kept.items() if count == SIZES[name]] == ["layer1.0.conv1"]
    expected = {
        "conv1": 0.580, "layer1.0.conv2": 0.8227, "layer2.0.conv2": 0.9133, "layer3.0.conv2": 0.9572,
        "layer4.0.conv2": 0.9787, "layer4.2.conv3": 0.8808, "fc": 0.9274,
    }  # fmt: skip
    assert {name: round(sparsity[name], 4 if name != "conv1" else 3) for name in expected} == expected


def test_resnet50_at_80_percent_has_eight_dense_layers():
    # Solving eps only once would miss the budget: these eight exceed 1 in turn.
    assert sum(count == SIZES[name] for name, count in erk(SHAPES, 0.8).items()) == 8


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.9, 0.95, 0.965, 0.98, 0.99, 0.9999, 1.0])
def test_budget_is_exact_and_no_layer_overflows(sparsity):
    kept = erk(SHAPES, sparsity)
    assert list(kept) == list(SHAPES) and sum(kept.values()) == global_budget(SIZES, sparsity)
    assert all(0 <= kept[name] <= SIZES[name] for name in kept)


def test_density_follows_the_shape_where_no_layer_is_dense():
    kept = erk(SHAPES, 0.98)
    ratios = [kept[n] / sum(SHAPES[n]) for n in SHAPES if kept[n] < SIZES[n]]
    assert max(ratios) - min(ratios) < 0.01 * min(ratios)


def test_nothing_empty_layers_and_block_counts():
    assert erk({}, 0.9) == {}
    assert erk({"none": (0, 3), "one": (8, 8)}, 0.5) == {"none": 0, "one": 32}
    assert erk({"a": (8, 8), "b": (8, 16)}, 0.5, {"a": 16, "b": 32}) == {"a": 10, "b": 14}
