"""soft_threshold_ against values computed element by element, on every backend."""

import copy
import math

import pytest
import torch

import sparsekern as sk

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# The last two are written past the caches, or would be if their rows did not end inside a line.
SHAPES = [(0, 4), (1, 1), (3, 5), (4, 17, 3, 3), (9, 16), (70, 31), (2, 40_000), (1024, 272), (1024, 257)]


def run(backend, *args):
    if backend == "reference":
        return sk.ops.soft_threshold_.reference(*args)
    sk.ops.soft_threshold_(*args[:-1], rescale=args[-1])


def problem(dtype, shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
    thresholds = [torch.tensor(0.25 * i) for i in range(len(weights))]
    return [torch.full_like(w, math.nan) for w in weights], weights, thresholds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_their_order_of_rounding(backend, dtype):
    outputs, weights, thresholds = problem(dtype)
    run(backend, outputs, weights, thresholds, [], False)
    gradients, slopes = [w.flip(0) for w in weights], [torch.empty_like(w) for w in weights]
    run(backend, slopes, weights, thresholds, gradients, False)
    for w, t, g, slope in zip(weights, thresholds, gradients, slopes, strict=True):
        assert torch.equal(slope, torch.where(w.double().abs() > t, g, 0))
    for out, weight, threshold in zip(outputs, weights, thresholds, strict=True):
        w = weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
        t = threshold.to(w.dtype)
        want = torch.where(w > t, w - t, torch.where(w < -t, w + t, 0)).to(dtype)
        torch.testing.assert_close(out, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_are_rescaled(backend, dtype):
    outputs, weights, thresholds = problem(dtype)
    run(backend, outputs, weights, thresholds, [], True)
    exact = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for out, weight, threshold in zip(outputs, weights, thresholds, strict=True):
        rows = weight.double().flatten(1)
        size = rows.abs()
        kept = torch.where(size > threshold, size, 0)
        scale = 1.01 / ((kept.mean(1, keepdim=True) + 1e-6) / (size.mean(1, keepdim=True) + 1e-6) + 0.01)
        want = scale * rows.sign() * (size - threshold).relu()
        torch.testing.assert_close(out.double().flatten(1), want, rtol=exact, atol=1e-7)


def test_threshold_zero_changes_nothing_and_special_values(backend):
    weights = problem(torch.float32)[1]
    outputs = [torch.empty_like(w) for w in weights]
    run(backend, outputs, weights, [torch.zeros(1)] * len(weights), [], True)
    torch.testing.assert_close(outputs, weights, rtol=0, atol=0)
    w = torch.tensor([[math.nan, math.inf, -math.inf, -0.0, 0.5, -0.5, 0.25, -3.0] * 3])
    out = torch.empty_like(w)
    run(backend, [out], [w], [torch.tensor(0.5)], [], False)
    want = torch.tensor([[math.nan, math.inf, -math.inf, 0, 0, 0, 0, -2.5] * 3])
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert not torch.signbit(out[0, 3:7]).any()
    run(backend, [out], [w], [torch.tensor(0.5)], [torch.ones_like(w)], False)
    assert out.tolist() == [[1.0, 1, 1, 0, 0, 0, 0, 1] * 3]


def test_threads_layouts_and_in_place(backend):
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(64, 9, 3, 3, generator=g), torch.randn(300, 1000, generator=g)]
    want = [torch.empty_like(w) for w in weights]
    half = [torch.tensor(0.5, dtype=torch.bfloat16)] * 2
    run(backend, want, weights, half, [], True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = copy.deepcopy(weights)
        before = [t._version for t in again]
        sk.ops.soft_threshold_(again, again, half, rescale=True)
        tolerance = dict(rtol=1e-6, atol=1e-7) if backend == "reference" else dict(rtol=0, atol=0)
        torch.testing.assert_close(again, want, **tolerance)
        assert all(t._version > b for t, b in zip(again, before, strict=True))
    finally:
        torch.set_num_threads(threads)
    for out in (
        torch.empty(64, 9, 3, 3).to(memory_format=torch.channels_last), torch.empty(64, 18, 3, 3)[:, ::2],
        torch.empty(9, 64, 3, 3).transpose(0, 1),
    ):  # fmt: skip
        out.fill_(math.nan)
        sk.ops.soft_threshold_([out], [weights[0].to(memory_format=torch.channels_last)], half[:1], rescale=True)
        torch.testing.assert_close(out, want[0], rtol=1e-6, atol=1e-7)


def test_opcheck():
    for rescale in (False, True):
        args = copy.deepcopy(problem(torch.float32, [(3, 4), (2, 17)]))
        gradients = [] if rescale else copy.deepcopy(args[1])
        torch.library.opcheck(torch.ops.sparsekern.soft_threshold_.default, (*args, gradients, rescale))


def test_bad_input_is_named():
    out, w, t = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor(0.5)
    for outputs, weights, thresholds, rescale, error, words in [
        ([out], [], [t], True, ValueError, "weights must have one entry for each of the 1 outputs, got 0"),
        ([out], [w], [], True, ValueError, "thresholds must have one entry"),
        ([out], [w], [torch.ones(2)], True, ValueError, r"thresholds\[0\] must be one number"),
        ([out], [w], [torch.ones(1).long()], True, ValueError, r"thresholds\[0\] must be a real number"),
        ([out[0]], [w[0]], [t], True, ValueError, r"weights\[0\] must have two dims or more"),
        ([out], [w.double()], [t], False, ValueError, r"weights\[0\] must be torch.float32"),
        ([out.long()], [w], [t], False, TypeError, r"outputs\[0\] must be one of"),
    ]:
        with pytest.raises(error, match=words):
            sk.ops.soft_threshold_(outputs, weights, thresholds, rescale=rescale)
        assert not out.any()
    for gradients, rescale, words in [
        ([w, w], False, "gradients must have one entry"), ([w], True, "gradients must be empty with rescale"),
        ([w.double()], False, r"gradients\[0\] must be torch.float32"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            sk.ops.soft_threshold_([out], [w], [t], gradients, rescale=rescale)
    both = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="overlaps the memory of"):
        sk.ops.soft_threshold_([both[:2]], [both[1:3]], [t])
