"""What topk_mask accepts and refuses: NaN, empty tensors, wrong arguments, and the dispatcher's own checks."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from topk_oracle import DTYPES, bits, mask, masks

import sparsekern as sk

OP = torch.ops.sparsekern.topk_mask


@pytest.fixture
def on_backend(backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr(sys.modules["sparsekern.ops.topk_mask"], "OP", sk.ops.topk_mask.reference)


@pytest.mark.usefixtures("on_backend")
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_raises(pattern, dtype):
    score = torch.ones(5, 6, dtype=dtype)
    score[4, 5] = float("nan")
    keep = None if pattern == "2:4" else 2
    with pytest.raises(ValueError, match=r"NaN in scores\[1\]"):
        masks([torch.ones(4, 4), score], keep, pattern=pattern)
    masks([score], keep, pattern=pattern, check=False)


@pytest.mark.usefixtures("on_backend")
def test_nan_raises_even_where_it_cannot_be_chosen():
    packed = [sk.ops.pack_mask(torch.tensor([True, False]))]
    for keep in (0, 1, [0]):
        with pytest.raises(ValueError, match="NaN"):
            mask(torch.tensor([1.0, float("nan")]), keep, candidates=packed)


@pytest.mark.usefixtures("on_backend")
def test_inf_minus_inf_in_a_block_is_nan():
    score = torch.tensor([[float("inf"), -float("inf"), 0, 0]])
    with pytest.raises(ValueError, match="NaN"):
        mask(score, 1, pattern="1x4", magnitude=False)
    assert bits(score, 1, pattern="1x4") == [1] * 4


@pytest.mark.usefixtures("on_backend")
def test_empty_and_scalar():
    assert sk.ops.topk_mask([], 0) == [] and sk.ops.topk_mask([], []) == []
    assert bits(torch.tensor(3.0), 1) == [1]
    for shape in [(0, 4), (4, 0), (0,)]:
        assert sk.ops.topk_mask([torch.empty(shape)], 0)[0].shape == (0,)
    for pattern, shape in itertools.product(["4x1", "1x4"], [(0, 5), (5, 0), (5, 5, 0, 2)]):
        assert sk.ops.topk_mask([torch.empty(shape)], [0], pattern=pattern)[0].shape == (0,)


def test_input_is_untouched_and_gradients_do_not_flow():
    score = torch.randn(8, 8, requires_grad=True)
    before = score.detach().clone()
    found = sk.ops.topk_mask([score], 10)[0]
    assert not found.requires_grad and torch.equal(score, before) and score._version == 0


ONE = torch.ones(4, 4)
FULL = torch.full((2,), 255, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("scores", "keep", "options", "error", "message"),
    [
        (ONE, 1, {}, TypeError, "scores is a Tensor"),
        ([ONE, 3], 1, {}, TypeError, r"scores\[1\] is a int"),
        ([ONE.int()], 1, {}, TypeError, r"scores\[0\] has dtype torch.int32"),
        ([ONE.to_sparse()], 1, {}, ValueError, r"scores\[0\] has layout"),
        ([ONE, ONE.to("meta")], 1, {}, ValueError, r"scores\[1\] is on meta"),
        ([ONE[0]], 1, {"pattern": "4x1"}, ValueError, r"scores\[0\] has 1 dim"),
        ([ONE[0]], None, {"pattern": "2:4"}, ValueError, r"scores\[0\] has 1 dim"),
        ([ONE], 17, {}, ValueError, "keep=17: expected 0 to 16"),
        ([ONE], -1, {}, ValueError, "keep=-1: expected 0 to 16"),
        ([ONE], 5, {"pattern": "1x4"}, ValueError, "keep=5: expected 0 to 4"),
        ([ONE, ONE], [16, 17], {}, ValueError, r"keep\[1\]=17: expected 0 to 16"),
        ([ONE, ONE], [1], {}, ValueError, "keep has 1 entries: expected 2"),
        ([ONE], 1.0, {}, TypeError, "keep=1.0 is a float"),
        ([ONE], True, {}, TypeError, "keep=True is a bool"),
        ([ONE], None, {}, ValueError, "keep=None"),
        ([ONE], 1, {"pattern": "2:4"}, ValueError, "keep=1: expected None"),
        ([ONE], None, {"pattern": "5:4"}, ValueError, "pattern='5:4'"),
        ([ONE], None, {"pattern": "0:4"}, ValueError, "pattern='0:4'"),
        ([ONE], 1, {"pattern": "4X1"}, ValueError, "pattern='4X1'"),
        ([ONE], 1, {"pattern": None}, ValueError, "pattern=None"),
        ([ONE], 1, {"candidates": FULL}, ValueError, "candidates: expected None or a list of 1"),
        ([ONE], 1, {"candidates": [FULL, FULL]}, ValueError, "candidates: expected None or a list of 1"),
        ([ONE], 1, {"candidates": [FULL[:1]]}, ValueError, r"candidates\[0\] has shape \(1,\)"),
        ([ONE], 1, {"candidates": [ONE.bool()]}, TypeError, r"candidates\[0\] is torch.bool"),
    ],
)
def test_clear_errors(scores, keep, options, error, message):
    with pytest.raises(error, match=message):
        sk.ops.topk_mask(scores, keep, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        (
            [torch.randn(5, 6), torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)],
            [20],
            True,
            "unstructured",
        ),
        ([torch.randn(5, 6), torch.randn(4, 3).double()], [3, 2], False, "4x1"),
        ([torch.randn(5, 6, requires_grad=True), torch.randn(4, 3)], [5], True, "1x4"),
        ([torch.randn(5, 6)], [], False, "2:4"),
        ([], [0], True, "unstructured"),
    ],
)
def test_opcheck(arguments):
    scores = arguments[0]
    torch.library.opcheck(OP.default, (*arguments, True, []))
    torch.library.opcheck(OP.default, (*arguments, False, [None] * len(scores)))
    full = [torch.full(((s.numel() + 7) // 8,), 255, dtype=torch.uint8) for s in scores]
    torch.library.opcheck(OP.default, (*arguments, True, full))


def test_reference_is_the_specification():
    score = torch.randn(8, 8)
    found, status = sk.ops.topk_mask.reference([score], [9], True, "unstructured", True, [])
    assert torch.equal(found[0], sk.ops.topk_mask([score], 9)[0])
    assert status.dtype == torch.int32 and status.shape == () and status.item() == 0
