"""FLOPs against the published counts for ResNet-50, and against hand counts for what models may hold."""

import math

import pytest
import torch
from torch import nn

import sparsekern as sk
from benchmarks.networks import resnet50_convs
from sparsekern.distributions import erk, uniform
from sparsekern.flops import LayerCost, dry_run, forward_flops, layer_costs, rigl_training_flops, training_flops
from sparsekern.updates import UpdateSchedule, cubic

COSTS = [
    *(LayerCost(c.name.removeprefix("resnet50/"), c.weight_shape, c.output_size**2) for c in resnet50_convs()),
    LayerCost("fc", (1000, 2048), 1),
]
SHAPES = {cost.name: cost.shape for cost in COSTS}
SIZES = {cost.name: cost.weights for cost in COSTS}
DENSE = forward_flops(COSTS)


def ratio(kept):
    return forward_flops(COSTS, kept) / DENSE


def uniform_ratio(sparsity, *dense):
    return ratio(uniform(SIZES, sparsity, dense))


def test_resnet50_dense():
    assert DENSE == 8_189_483_496
    assert sum(cost.positions * cost.weights for cost in COSTS) == 4_089_184_256


@pytest.mark.parametrize(
    ("sparsity", "by_erk", "first_dense", "both_dense"),
    [
        (0.8, 0.4146, 0.2241, 0.2245),
        (0.9, 0.2429, 0.1272, 0.1276),
        (0.95, 0.1229, 0.0787, 0.0791),
        (0.965, 0.0864, 0.0641, 0.0646),
        (0.98, 0.0500, 0.0496, 0.0501),
        (0.99, 0.0257, 0.0399, 0.0404),
    ],
)
def test_resnet50_ratios(sparsity, by_erk, first_dense, both_dense):
    found = [ratio(erk(SHAPES, sparsity)), uniform_ratio(sparsity, "conv1"), uniform_ratio(sparsity, "conv1", "fc")]
    assert [round(value, 4) for value in found] == [by_erk, first_dense, both_dense]


def rigl_kept(distribution, sparsity):
    """The layer rules of google-research/rigl: uniform keeps the first layer dense, and so does ERK at 99%."""
    if distribution == "uniform":
        return uniform(SIZES, sparsity, ("conv1",))
    return erk({n: shape for n, shape in SHAPES.items() if sparsity < 0.99 or n != "conv1"}, sparsity)


@pytest.mark.parametrize(
    ("distribution", "sparsity", "times", "training", "inference"),
    [
        ("erk", 0.8, 5, 2.09, 0.42), ("uniform", 0.8, 5, 1.14, 0.23), ("erk", 0.9, 5, 1.23, 0.24),
        ("uniform", 0.9, 5, 0.66, 0.13), ("erk", 0.95, 5, 0.63, 0.12), ("uniform", 0.95, 5, 0.42, 0.08),
        ("erk", 0.965, 5, 0.45, 0.09), ("uniform", 0.965, 5, 0.34, 0.07), ("erk", 0.99, 5, 0.29, 0.05),
        ("erk", 0.8, 1, 0.42, 0.42), ("uniform", 0.8, 1, 0.23, 0.23), ("erk", 0.9, 1, 0.24, 0.24),
        ("uniform", 0.9, 1, 0.13, 0.13),
    ],
)  # fmt: skip
def test_table_published_by_rigl(distribution, sparsity, times, training, inference):
    """Its README, whose two digits are cut in some rows and rounded up in others; dense 8.2e9 and 3.2e18 FLOPs."""
    sparse = forward_flops(COSTS, rigl_kept(distribution, sparsity))
    average = times * rigl_training_flops(sparse, DENSE, 100) / (3 * DENSE)
    assert abs(inference - sparse / DENSE) < 0.01
    assert abs(training - average) < (0.012 if training == 0.42 else 0.01)  # 0.42 is 0.409 by their own formula
    assert round(DENSE, -8) == 8.2e9 and round(training_flops([(32_000 * 4096, DENSE)]), -17) == 3.2e18


def test_erk_at_99_percent_with_and_without_the_first_layer():
    rest = {name: shape for name, shape in SHAPES.items() if name != "conv1"}
    assert [round(ratio(erk(shapes, 0.99)), 4) for shapes in (SHAPES, rest)] == [0.0257, 0.0533]


def test_training_of_rigl():
    for sparsity, published in ((0.95, 0.1258), (0.9, 0.2454), (0.8, 0.4165)):
        sparse = forward_flops(COSTS, erk(SHAPES, sparsity))
        assert round(rigl_training_flops(sparse, DENSE, 100) / (3 * DENSE), 4) == published


def test_training_of_acdc():
    for sparsity, expected in ((0.95, 0.5396), (0.9, 0.5638)):
        sparse = forward_flops(COSTS, uniform(SIZES, sparsity, ("conv1", "fc")))
        phases = sk.acdc_schedule(100).resolve(10, sparsity).phases
        spans = [(span.steps, DENSE if span.phase == sk.Dense() else sparse) for span in phases]
        assert round(training_flops(spans) / (3 * DENSE * 1000), 4) == expected


@pytest.mark.parametrize(("sparsity", "expected"), [(0.8, 0.5596), (0.9, 0.5045), (0.95, 0.4770)])
def test_training_of_gmp(sparsity, expected):
    """Known for the smooth curve; the masks follow it in 15 steps, each a little behind it, which costs 1% more."""
    costs = [forward_flops(COSTS, uniform(SIZES, cubic(t / 150, 0, sparsity), ("conv1",))) for t in range(151)]
    smooth = [(10_000, DENSE), *((100, cost) for cost in costs[:150]), (7_000, costs[150])]
    assert training_flops(smooth) / (3 * DENSE * 32_000) == pytest.approx(expected, abs=2e-3)
    model = nn.Linear(8, 8)
    gmp = sk.GMP(sparsity, UpdateSchedule(10_000, 25_000, 1_000, 32_000))
    gmp.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), verbose=False)
    edges = [0, *gmp.schedule.steps(), 32_000]
    kept = [uniform(SIZES, gmp.at(start), ("conv1",)) for start in edges[:-1]]
    spans = [(b - a, forward_flops(COSTS, k)) for a, b, k in zip(edges, edges[1:], kept, strict=False)]
    assert 0.01 < training_flops(spans) / (3 * DENSE * 32_000) - expected < 0.015


def test_traced_resnet50():
    torchvision = pytest.importorskip("torchvision", reason="torchvision builds the ResNet-50 to trace")
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    costs = layer_costs(model, torch.empty(2, 3, 224, 224))
    assert forward_flops(costs) == DENSE and model.training
    assert {c.name: (c.shape, c.positions) for c in costs} == {
        f"{c.name}.weight": (c.shape, c.positions) for c in COSTS
    }


class Odd(nn.Module):
    """A layer used twice, a shared weight, tokens, groups, a layer never called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.token = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.token.weight
        self.unused = nn.Linear(3, 3)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x, twice):
        tokens = self.norm(self.conv(x)).flatten(2).transpose(1, 2) * self.scale
        tokens = self.token(self.token(tokens)) if twice else self.token(tokens)
        return self.tied(tokens)


def test_what_models_may_hold():
    model = Odd()
    model.norm.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    costs = {c.name: c for c in layer_costs(model, torch.empty(5, 4, 6, 10), True)}
    assert {name: c.positions for name, c in costs.items()} == {
        "conv.weight": 15, "token.weight": 45, "unused.weight": 0
    }  # fmt: skip
    # 8 outputs at 15 positions, each 2 * (2 * 3 * 3) operations and one more.
    assert costs["conv.weight"].flops(144) == 15 * 8 * (2 * 18 + 1)
    assert model.training and not model.norm.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.conv._forward_hooks


def test_dry_run_of_masks_and_of_counts():
    model = Odd()
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    masks = sk.planned_masks(model, 0.75, distribution="uniform", layer_sparsity={"first": 0.0}, exclude=["unused"])
    found = dry_run(model, masks, torch.empty(1, 4, 6, 10), False)
    assert [(cost.name, kept) for cost, kept in found.layers] == [
        ("conv.weight", 144), ("token.weight", 16), ("unused.weight", 9)
    ]  # fmt: skip
    assert found.dense == 15 * (2 * 144 + 8) + 30 * (2 * 64 + 8) and found.sparse == found.dense - 30 * 2 * 48
    assert "8x2x3x3" in str(found) and f"inference {found.sparse / found.dense:.4f} of dense" in str(found)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    counts = dry_run(model, {"token.weight": 16}, torch.empty(1, 4, 6, 10), False)
    assert counts.sparse == found.sparse


def test_accelerated_model():
    model = nn.Sequential(nn.Linear(8, 8))
    masks = sk.planned_masks(model, 0.5)
    plain = str(dry_run(model, masks, torch.empty(1, 8)))
    sk.nn.accelerate(model, masks, choose=lambda *_: pytest.fail("asked to measure a dry run"))
    assert str(dry_run(model, masks, torch.empty(1, 8))) == plain


def test_bad_input_is_named():
    model = nn.Linear(2, 2)
    for example in ((), (3,), (torch.empty(0, 2),)):
        with pytest.raises(ValueError, match="example must hold a tensor"):
            layer_costs(model, *example)
    with pytest.raises(ValueError, match=r"masks: \['fc.weight'\] are no layers"):
        dry_run(model, {"fc.weight": 1}, torch.empty(1, 2))
    assert math.isclose(dry_run(model, {}, torch.empty(1, 2)).sparse, 10)
