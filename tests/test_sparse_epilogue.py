"""Scale, residual and activation of sparse_conv2d: fused and step by step they are the same bits."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern import _direct
from sparsekern.ops import sparse_calls

LAST = torch.channels_last
CASES = [
    (16, 8, (1, 1), (9, 11), 1, 0, 3),  # in place, with a short last vector
    (72, 8, (3, 3), (14, 14), 1, 1, 2),  # through scratch, in two turns
    (12, 16, (3, 3), (7, 7), 2, 1, 2),
    (32, 16, (1, 1), (64, 64), 1, 0, 17),  # past the caches
]
AFTER = [
    {"activation": "relu"},
    {"activation": "relu6", "scale": True},
    {"residual": True},
    {"activation": "relu", "scale": True, "residual": True},
]


def operands(case, pattern, last=False):
    out, channels, kernel, size, stride, padding, batch = case
    torch.manual_seed(0)
    axis = {"4x1": 0, "1x4": 1}.get(pattern)
    w = torch.randn(out, channels, *kernel)
    keep = torch.rand([n // 4 if d == axis else n for d, n in enumerate(w.shape)]) < 0.4
    s = sk.ops.sparse_structure(keep if axis is None else keep.repeat_interleave(4, axis), pattern)
    form = LAST if last else torch.contiguous_format
    x = (4 * torch.randn(batch, channels, *size)).to(memory_format=form)
    return (x, w.to(memory_format=form), s, torch.randn(out), stride, padding)


def filled(after, result):
    found = dict(after)
    if found.get("scale"):
        found["scale"] = torch.randn(result.shape[1])
    if found.get("residual"):
        found["residual"] = torch.randn_like(result)
    return found


def by_steps(args, after):
    x, w, s, bias, *geometry = args
    scale = after.get("scale")
    y = sk.ops.sparse_conv2d(x, w, s, None if scale is not None else bias, *geometry)
    y = y if scale is None else y * scale[:, None, None] + bias[:, None, None]
    y = y + after["residual"] if "residual" in after else y
    return {None: y, "relu": y.clamp(min=0), "relu6": y.clamp(0, 6)}[after.get("activation")]


@pytest.mark.parametrize("after", AFTER, ids=["+".join(a) for a in AFTER])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pattern", ["4x1", "unstructured", "1x4"])
def test_fused_equals_steps_bit_for_bit(backend, monkeypatch, case, pattern, after):
    if backend == "emulated-cuda":
        pytest.skip("no CUDA kernel")
    went = []
    run = _direct.run or sparse_calls._run
    monkeypatch.setattr(_direct, "run", lambda *a: (went.append(a[5]), run(*a))[1])
    for last in (False, True):
        args = operands(case, pattern, last)
        args[0][0, 0, 2, 2] = torch.nan
        given = filled(after, sk.ops.sparse_conv2d(*args))
        want = by_steps(args, given)
        for _ in range(2):
            found = sk.ops.sparse_conv2d(*args, **given)
            torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)
            assert found.stride() == want.stride()
        if backend != "reference" and "residual" in given:
            assert went[-1] is given["residual"], "the repeated call was not fused"


def test_gradients_and_single_images():
    x, w, s, bias, *geometry = operands(CASES[1], "4x1")
    given = filled(AFTER[3], sk.ops.sparse_conv2d(x, w, s, bias, *geometry))
    leaves = [t.double().requires_grad_() for t in (x, torch.where(s.mask(), w, 0), bias, *list(given.values())[1:])]
    a, b, c, scale, residual = leaves
    found = sk.ops.sparse_conv2d(a, b, s, c, *geometry, scale=scale, residual=residual, activation="relu")
    y = torch.nn.functional.conv2d(a, b, None, *geometry) * scale[:, None, None] + c[:, None, None] + residual
    g = torch.randn_like(y)
    got, want = torch.autograd.grad(found, leaves, g), torch.autograd.grad(y.relu(), leaves, g)
    torch.testing.assert_close(got[:1] + got[2:], want[:1] + want[2:])
    torch.testing.assert_close(got[1], torch.where(s.mask(), want[1], 0))
    one = sk.ops.sparse_conv2d(x[0], w, s, bias, *geometry, residual=given["residual"][0], activation="relu")
    assert torch.equal(one, sk.ops.sparse_conv2d(x, w, s, bias, *geometry, **{**given, "scale": None})[0])


@pytest.mark.parametrize(
    ("after", "error", "message"),
    [
        ({"activation": "gelu"}, ValueError, "activation='gelu'"),
        ({"activation": []}, (TypeError, ValueError), "activation|unhashable"),
        ({"scale": torch.ones(3)}, ValueError, "scale has shape"),
        ({"scale": torch.ones(16).double()}, TypeError, "scale has dtype"),
        ({"scale": 2.0}, TypeError, "scale is a float"),
        ({"residual": torch.ones(1, 16, 14, 14)}, ValueError, "residual has shape"),
    ],
)
def test_wrong_arguments_are_named(after, error, message):
    args = operands(CASES[1], "4x1")
    for _ in range(2):  # a first call, and one that is known
        with pytest.raises(error, match=message):
            sk.ops.sparse_conv2d(*args, **after)
        sk.ops.sparse_conv2d(*args)
