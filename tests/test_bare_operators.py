"""Operators called without their public wrappers: input that does not fit is a named error, compiled or not."""

import pytest
import torch

import sparsekern as sk
from sparsekern import _library

OPERATORS = torch.ops.sparsekern
ONE, TWO, BITS = torch.ones(4), [torch.ones(4), torch.ones(4)], torch.zeros(1, dtype=torch.uint8)
NO_MASKS, FRESH = [None, None], torch.zeros(2, dtype=torch.uint8)


@pytest.fixture(params=["operator", "reference"])
def call(request):
    """Calls an operator through the dispatcher, or its reference, by name."""
    if request.param == "reference":
        return lambda name, *args, **options: _library.OPS[name](*args, **options)
    return lambda name, *args, **options: getattr(OPERATORS, name)(*args, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": [ONE]}, "grads"),
        ({"momentum": [ONE]}, "momentum must have one entry"),
        ({"momentum": []}, "momentum must have one entry"),
        ({"masks": [None]}, "masks"),
        ({"fresh": BITS}, "fresh"),
        ({"inner": [None]}, "inner"),
        ({"known_zero": [1]}, "known_zero"),
        ({"known_zero": [1, 1], "momentum_policy": "decay"}, "known_zero"),
        ({"momentum_policy": "drop"}, "momentum_policy must be one of .*, got 'drop'"),
    ],
)
def test_masked_sgd(call, changes, message):
    operands = {"params": TWO, "grads": [ONE, ONE], "momentum": TWO, "masks": NO_MASKS, "fresh": FRESH}
    hyper = dict(lr=0.1, mu=0.9, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False)
    with pytest.raises((ValueError, RuntimeError), match=message):
        call("masked_sgd_", **{**operands, **hyper, "momentum_policy": "mask", "inner": [], **changes})
    assert all(t.eq(1).all() for t in TWO)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": [ONE]}, "grads"),
        ({"exp_avg": [ONE]}, "exp_avg"),
        ({"exp_avg_sq": []}, "exp_avg_sq"),
        ({"masks": [None]}, "masks"),
        ({"steps": torch.zeros(1)}, "steps"),
        ({"known_zero": [1]}, "known_zero"),
    ],
)
def test_masked_adamw(call, changes, message):
    operands = {"params": TWO, "grads": [ONE, ONE], "exp_avg": TWO, "exp_avg_sq": TWO, "masks": NO_MASKS}
    hyper = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0, maximize=False)
    with pytest.raises((ValueError, RuntimeError), match=message):
        call("masked_adamw_", **{**operands, "steps": torch.zeros(2), **hyper, **changes})
    assert all(t.eq(1).all() for t in TWO)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": [ONE]}, "first"),
        ({"second": [ONE]}, "second"),
        ({"second": [], "pruned": [0.0, 1.0]}, "second"),
        ({"masks": [None]}, "masks"),
        ({"live": [1.0]}, "live"),
        ({"times": [ONE]}, "times"),
        ({"within": [None]}, "within"),
    ],
)
def test_masked_combine(call, changes, message):
    operands = {
        "outputs": TWO,
        "first": TWO,
        "second": TWO,
        "masks": NO_MASKS,
        "live": [2.0, 0.0],
        "pruned": [2.0, 0.0],
        "scale": None,
        "times": [],
        "magnitude": False,
        "within": [],
    }
    with pytest.raises((ValueError, RuntimeError), match=message):
        call("masked_combine_", **{**operands, **changes})
    assert all(t.eq(1).all() for t in TWO)


@pytest.mark.parametrize(("scores", "keep", "message"), [([], 0, "scores"), (TWO, 9, "keep"), (TWO, -1, "keep")])
def test_topk_bounds(call, scores, keep, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call("topk_bounds", scores, keep)


@pytest.mark.parametrize(
    ("weights", "thresholds", "gradients"),
    [([ONE], TWO, []), (TWO, [ONE.sum()], []), (TWO, [ONE, torch.ones(2)], []), (TWO, [ONE.sum()] * 2, [ONE])],
)
def test_soft_threshold(call, weights, thresholds, gradients):
    with pytest.raises((ValueError, RuntimeError), match="weights|thresholds|gradients"):
        call("soft_threshold_", TWO, weights, thresholds, gradients, False)
    assert all(t.eq(1).all() for t in TWO)


@pytest.mark.parametrize("changes", [{"grads": [ONE]}, {"weights": [ONE]}, {"masks": [None]}, {"penalties": [1.0]}])
def test_movement_step(call, changes):
    operands = {"scores": TWO, "grads": TWO, "weights": TWO, "masks": NO_MASKS, "lr": 0.1, "penalties": [0.0, 0.0]}
    with pytest.raises((ValueError, RuntimeError), match=next(iter(changes))):
        call("movement_step_", **{**operands, **changes})
    assert all(t.eq(1).all() for t in TWO)


def test_sums_and_thresholds(call):
    for name, *operands in [("signed_sums", [], []), ("signed_sums", TWO, [ONE]), ("threshold_mask", [], 0.0)]:
        with pytest.raises((ValueError, RuntimeError), match="values"):
            call(name, *operands)


@pytest.mark.parametrize(
    ("scores", "keep", "pattern"),
    [([], [0], "4x1"), (TWO, [], "unstructured"), (TWO, [1, -1], "unstructured"), (TWO, [1], "1:2")],
)
def test_topk_nested(call, scores, keep, pattern):
    with pytest.raises((ValueError, RuntimeError), match="scores|keep|pattern"):
        call("topk_nested", scores, keep, pattern, True)


@pytest.mark.skipif(bool(sk.degradation), reason="the reference takes any strides")
@pytest.mark.parametrize("view", [lambda t: t[::2], lambda t: t[:1].expand(4), lambda t: t.view(2, 4)[:, :2]])
def test_masked_steps_write_nothing_outside_a_parameter(view):
    base = torch.ones(8)
    w = view(base)
    rest = [w.detach()]
    with pytest.raises(RuntimeError, match=r"params\[0\] must fill its memory"):
        OPERATORS.masked_sgd_(
            [w], rest, rest, [None], BITS, lr=0.1, mu=0.9, dampening=0.0, weight_decay=0.0, nesterov=False,
            maximize=False, momentum_policy="mask", inner=[],
        )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"params\[0\] must fill its memory"):
        OPERATORS.masked_adamw_(
            [w], rest, rest, rest, [None], torch.zeros(1), lr=0.1, beta1=0.9, beta2=0.9, eps=0.0, weight_decay=0.0,
            maximize=False,
        )  # fmt: skip
    assert base.eq(1).all()


@pytest.mark.parametrize(
    ("scores", "keep", "whole", "pattern", "candidates"),
    [
        (TWO, [], True, "unstructured", []),
        (TWO, [1, 2], True, "unstructured", []),
        (TWO, [1], False, "unstructured", []),
        (TWO, [-1], True, "unstructured", []),
        (TWO, [1, -1], False, "unstructured", []),
        (TWO, [1], True, "unstructured", [None]),
        ([torch.ones(4, 4)], [1], False, "2:4", []),
    ],
)
def test_topk_mask(call, scores, keep, whole, pattern, candidates):
    with pytest.raises((ValueError, RuntimeError), match="keep|candidates"):
        call("topk_mask", scores, keep, whole, pattern, True, candidates)


def test_topk_mask_of_more_than_there_is(call):
    for keep, whole in (([9], True), ([9, 1], False)):
        masks, status = call("topk_mask", TWO, keep, whole, "unstructured", True, [])
        assert masks[0].tolist() == [15] and status == 2


POINTERS = [torch.tensor([0, 1, 1, 1, 1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)]
X, W = torch.ones(2, 8), torch.ones(4, 8)
IMAGE, KERNEL, GEOMETRY = torch.ones(1, 2, 4, 4), torch.ones(4, 2, 2, 2), ([1, 1], [0, 0], [1, 1], 1)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("sparse_linear", (torch.tensor(1.0), W, POINTERS, "unstructured", None), "dim|1D"),
        ("sparse_linear", (X, W[:, :, None, None], POINTERS, "unstructured", None), "dim"),
        ("sparse_linear", (X[:, :7], W, POINTERS, "unstructured", None), "input|shapes"),
        ("sparse_linear", (X, W, [], "unstructured", None), "structure has 0"),
        ("sparse_linear_backward", (X[:, :4], X, W, POINTERS, "unstructured", [True]), "needs has 1"),
        ("sparse_conv2d", (IMAGE[0], KERNEL, POINTERS, "unstructured", None, *GEOMETRY), "input has 3"),
        ("sparse_conv2d", (IMAGE, KERNEL, POINTERS, "unstructured", None, [1], *GEOMETRY[1:]), "stride"),
        ("sparse_conv2d", (IMAGE, KERNEL, POINTERS, "unstructured", None, *GEOMETRY[:3], 0), "groups|channels"),
        ("sparse_conv2d", (IMAGE[:, :1], KERNEL, POINTERS, "unstructured", None, *GEOMETRY), "channels"),
        ("sparse_conv2d_backward", (IMAGE, IMAGE, KERNEL, POINTERS, "unstructured", *GEOMETRY, []), "needs has 0"),
        ("sparse_conv2d_backward", (X, IMAGE, KERNEL, POINTERS, "unstructured", *GEOMETRY, [True] * 3), "grad has 2"),
    ],
)
def test_sparse_layers(call, name, arguments, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(name, *arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": torch.ones(4)}, "input"),
        ({"weight": torch.ones(3)}, "weight"),
        ({"bias": torch.ones(3)}, "bias"),
        ({"residual": IMAGE[:, :1]}, "residual"),
    ],
)
def test_batch_norm(call, changes, message):
    operands = {"input": IMAGE, "weight": None, "bias": None, "residual": None, **changes}
    with pytest.raises((ValueError, RuntimeError), match=message):
        call("batch_norm", *operands.values(), True, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": IMAGE[:, :1]}, "grad"),
        ({"weight": torch.ones(3)}, "weight"),
        ({"output": IMAGE[:, :, :2]}, "output"),
        ({"mean": torch.ones(3)}, "mean"),
        ({"variance": torch.ones(1)}, "variance"),
        ({"needs": [True]}, "needs has 1"),
    ],
)
def test_batch_norm_backward(call, changes, message):
    operands = {"grad": IMAGE, "input": IMAGE, "weight": None, "output": None, "mean": torch.ones(2)}
    rest = {"variance": torch.ones(2), "eps": 1e-5, "needs": [True] * 4}
    with pytest.raises((ValueError, RuntimeError), match=message):
        call("batch_norm_backward", *{**operands, **rest, **changes}.values())
