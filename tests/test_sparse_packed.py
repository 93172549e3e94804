"""Packed weights, plans that are kept, and calls that skip what they were checked for before."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch

import sparsekern as sk
from sparsekern.ops import sparse_calls, sparse_kernels

PATTERNS = ["unstructured", "1x4", "4x1"]
LAST = torch.channels_last


def layer(pattern, shape=(8, 8, 3, 3), groups=1):
    """A weight, its structure and its mask, of about half of the blocks."""
    torch.manual_seed(0)
    grid = list(shape)
    axis = {"4x1": 0, "1x4": 1}.get(pattern)
    if axis is not None:
        grid[axis] //= 4
    mask = torch.rand(grid) < 0.5
    mask = mask if axis is None else mask.repeat_interleave(4, axis)
    return torch.randn(shape), sk.ops.sparse_structure(mask, pattern, groups=groups), mask


@pytest.mark.parametrize("shape", [(8, 4), (8, 8, 3, 2), (6, 5, 1, 1)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pack_and_unpack_are_inverse(pattern, shape):
    w, s, mask = layer("unstructured" if shape[0] == 6 else pattern, shape)
    values = s.pack(w)
    assert values.shape == (s.kept,) == (int(mask.sum()),)
    assert torch.equal(s.unpack(values), torch.where(mask, w, 0))
    with pytest.raises(ValueError, match="weight has shape"):
        s.pack(w[1:])
    with pytest.raises(ValueError, match="packed values"):
        s.unpack(values[1:])


def test_packed_values_are_in_the_order_of_the_structure():
    w = torch.arange(8 * 8).reshape(8, 8).float()
    keep = torch.zeros(8, 8, dtype=torch.bool)
    keep[0, 5] = keep[0, 2] = keep[3, 1] = True
    assert sk.ops.sparse_structure(keep).pack(w).tolist() == [2, 5, 25]
    wide = torch.zeros(8, 8, dtype=torch.bool)
    wide[2, 4:] = wide[5, :4] = wide[5, 4:] = True
    assert sk.ops.sparse_structure(wide, "1x4").pack(w).tolist() == [*range(20, 24), *range(40, 48)]
    tall = wide.t()
    assert sk.ops.sparse_structure(tall, "4x1").pack(w).tolist() == [5, 13, 21, 29, 34, 42, 50, 58, 37, 45, 53, 61]


@pytest.mark.parametrize("geometry", [(1, 0, 1, 1), (2, 1, 1, 2), ((1, 3), (2, 0), (2, 1), 1)])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("last", [False, True])
def test_packed_conv2d_equals_dense_conv2d(backend, pattern, geometry, last):
    groups = geometry[-1]
    if backend == "emulated-cuda" and groups > 1:
        pytest.skip("takes torch's dense path")
    w, s, _ = layer(pattern, (8, 8 // groups, 3, 3), groups)
    x, b = torch.randn(2, 8, 9, 7, requires_grad=True), torch.randn(8, requires_grad=True)
    form = LAST if last else torch.contiguous_format
    packed = s.pack(w).requires_grad_()
    found = sk.ops.sparse_conv2d(x.to(memory_format=form), packed, s, b, *geometry)
    weight = w.clone().requires_grad_()
    want = sk.ops.sparse_conv2d(x.to(memory_format=form), weight, s, b, *geometry)
    assert torch.equal(found, want) and found.stride() == want.stride()
    grads = torch.autograd.grad(found.square().sum(), (x, packed, b))
    expected = torch.autograd.grad(want.square().sum(), (x, weight, b))
    assert torch.equal(grads[0], expected[0]) and torch.equal(grads[2], expected[2])
    assert torch.equal(grads[1], s.pack(expected[1]))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_linear_equals_dense_linear(backend, pattern):
    w, s, _ = layer(pattern, (12, 16))
    x = torch.randn(3, 5, 16, requires_grad=True)
    packed, weight = s.pack(w).requires_grad_(), w.clone().requires_grad_()
    found, want = sk.ops.sparse_linear(x, packed, s), sk.ops.sparse_linear(x, weight, s)
    assert torch.equal(found, want)
    grads = torch.autograd.grad(found.square().sum(), (x, packed))
    expected = torch.autograd.grad(want.square().sum(), (x, weight))
    assert torch.equal(grads[0], expected[0]) and torch.equal(grads[1], s.pack(expected[1]))


@pytest.mark.parametrize("dims", [2, 4])
def test_opcheck_and_gradcheck_of_packed_weights(dims):
    w, s, _ = layer("1x4", (4, 8, 2, 2)[:dims])
    x = torch.randn((2, 8, 3, 3) if dims == 4 else (3, 8), dtype=torch.float64, requires_grad=True)
    values = s.pack(w).double().requires_grad_()
    function = sk.ops.sparse_conv2d if dims == 4 else sk.ops.sparse_linear
    assert torch.autograd.gradcheck(lambda x, v: function(x, v, s), (x, values))
    operands = x.detach().float().requires_grad_(), s.pack(w).requires_grad_(), list(s.tensors), s.layout, None
    if dims == 4:
        torch.library.opcheck(torch.ops.sparsekern.sparse_conv2d, (*operands, [1, 1], [0, 0], [1, 1], 1, s.shape))
    else:
        torch.library.opcheck(torch.ops.sparsekern.sparse_linear, (*operands, s.shape))


def test_packed_weights_of_the_wrong_size_raise():
    w, s, _ = layer("4x1")
    x = torch.randn(1, 8, 4, 4)
    with pytest.raises(ValueError, match="packed values: expected"):
        sk.ops.sparse_conv2d(x, s.pack(w)[4:], s)
    geometry = [1, 1], [0, 0], [1, 1], 1
    op = torch.ops.sparsekern.sparse_conv2d
    with pytest.raises(ValueError, match="shape=None"):
        op(x, s.pack(w), list(s.tensors), s.layout, None, *geometry)
    with pytest.raises((ValueError, RuntimeError), match="packed"):
        op(x, s.pack(w)[4:], list(s.tensors), s.layout, None, *geometry, s.shape)
    op(x, s.pack(w), list(s.tensors), s.layout, None, *geometry, s.shape)
    with pytest.raises((ValueError, RuntimeError), match="packed"):  # with a plan at hand
        op(x, s.pack(w)[4:], list(s.tensors), s.layout, None, *geometry, s.shape)


def test_repeated_calls_see_new_values_structures_and_instruction_sets(native_isa):
    w, s, mask = layer("unstructured")
    x, bias = torch.randn(2, 8, 6, 6), torch.randn(8)

    def agrees(mask):
        for b in (None, bias):
            want = torch.nn.functional.conv2d(x, torch.where(mask, w, 0), b, 1, 1)
            for asked in (True, True, False, False, True):
                torch.testing.assert_close(sk.ops.sparse_conv2d(x.requires_grad_(asked), w, s, b, 1, 1), want)
            x.requires_grad_(False)

    agrees(mask)
    w.data.mul_(-2)  # behind the back of the version counter
    agrees(mask)
    x.mul_(3)
    agrees(mask)
    before = torch.ops.sparsekern.cpu_isa()
    for isa in ("scalar", before):
        torch.ops.sparsekern.set_cpu_isa(isa)
        agrees(mask)
    row = mask[0].flatten().nonzero().flatten().tolist()
    free = next(i for i in range(71, -1, -1) if i not in row)
    s.tensors[1][: len(row)] = torch.tensor(sorted([*row[1:], free]), dtype=torch.int32)
    agrees(s.mask())
    s.tensors[1][0] = 500
    with pytest.raises(ValueError, match="structure"):
        sk.ops.sparse_conv2d(x, w, s, None, 1, 1)


@pytest.fixture
def native_isa():
    if not sk._library.kernels_loaded:
        pytest.skip("no compiled kernels")
    before = torch.ops.sparsekern.cpu_isa()
    yield before
    torch.ops.sparsekern.set_cpu_isa(before)


def test_only_plain_unwatched_calls_are_short(native_isa, monkeypatch):
    w, s, _ = layer("4x1")
    x = torch.randn(1, 8, 5, 5)
    went = []
    repeat = sparse_calls.repeat
    monkeypatch.setattr(sparse_calls, "repeat", lambda *a: (went.append(repeat(*a)), went[-1])[1])
    run = lambda *rest: (sk.ops.sparse_conv2d(x, w, s, *rest), went[-1] is not None)[1]  # noqa: E731
    assert [run(), run(), run()] == [False, True, True]
    for stride in ([1, 1], 1.0, True):
        try:
            assert not run(None, stride)
        except TypeError:
            assert type(stride) is not list, "one or two ints are allowed"
    w.requires_grad_()
    assert run() and sk.ops.sparse_conv2d(x, w, s).requires_grad
    with torch.no_grad():
        assert run()
    with torch.autograd.forward_ad.dual_level():
        assert not run()
    with torch.utils.flop_counter.FlopCounterMode(display=False), torch.no_grad():
        assert not run()
    w.requires_grad_(False)
    with pytest.raises(RuntimeError, match="Batching rule"):  # torch has none for operators on lists of tensors
        torch.func.vmap(lambda x: sk.ops.sparse_conv2d(x, w, s))(torch.stack([x, 2 * x]))


def test_repeated_calls_of_one_shape_may_lie_differently(native_isa):
    w, s, mask = layer("4x1")
    x, wide = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 12)
    halves = [t.bfloat16() for t in (x, w)]
    images = x, x.to(memory_format=torch.channels_last), wide[..., ::2], x.transpose(2, 3)
    weights = w, s.pack(w), w.to(memory_format=torch.channels_last), w.transpose(2, 3).contiguous().transpose(2, 3)
    kept, want = torch.where(mask, w, 0), torch.nn.functional.conv2d
    for _ in range(2):
        for image in images:
            for weight in weights:
                for asked in (False, True):
                    found = sk.ops.sparse_conv2d(image.detach().requires_grad_(asked), weight, s, None, 1, 1)
                    torch.testing.assert_close(found, want(image, kept, None, 1, 1))
                    last = image is images[1]
                    assert found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        rounded = sk.ops.sparse_conv2d(*halves, s, None, 1, 1)
        torch.testing.assert_close(rounded, want(halves[0], torch.where(mask, halves[1], 0), None, 1, 1))
        for refused in (x.to_sparse(), x.to("meta"), x.double()):
            with pytest.raises((TypeError, ValueError), match=r"input|weight"):
                sk.ops.sparse_conv2d(refused, w, s, None, 1, 1)


@pytest.mark.parametrize("asked", ["xwb", "w", "x", "b"])
@pytest.mark.parametrize("last", [False, True])
def test_repeated_calls_have_the_gradients_of_the_first(native_isa, asked, last):
    w, s, mask = layer("4x1")
    x, bias = torch.randn(2, 8, 6, 6), torch.randn(8)
    x = x.to(memory_format=torch.channels_last) if last else x
    given = [t.clone().requires_grad_(name in asked) for name, t in {"x": x, "w": w, "b": bias}.items()]
    exact = [t.detach().double().requires_grad_() for t in given]
    ramp = torch.linspace(-1, 1, 2 * 8 * 3 * 3).reshape(2, 8, 3, 3)
    torch.nn.functional.conv2d(exact[0], torch.where(mask, exact[1], 0), exact[2], 2, 1).backward(ramp.double())
    for name in ("first", "SparseProduct", "SparseProduct"):
        result = sk.ops.sparse_conv2d(given[0], given[1], s, given[2], 2, 1)
        assert name == "first" or type(result.grad_fn).__name__.startswith(name)
        result.backward(ramp)
        for got, want in zip(given, exact, strict=True):
            assert (got.grad is None) != got.requires_grad
            if got.grad is not None:
                torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-5, atol=1e-5)
                got.grad = None


def test_repeated_calls_refuse_what_the_first_refuses(native_isa):
    w, s, _ = layer("4x1")
    x, w = torch.randn(1, 8, 5, 5, requires_grad=True), w.requires_grad_()
    for _ in range(3):
        with pytest.raises(NotImplementedError, match="no second derivative"):
            (grad,) = torch.autograd.grad(sk.ops.sparse_conv2d(x, w, s).square().sum(), x, create_graph=True)
            grad.sum().backward()
        for changed in (w, *s.tensors):
            result = sk.ops.sparse_conv2d(x, w, s)
            with torch.no_grad():
                changed.add_(0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.sum().backward()
        sk.ops.sparse_conv2d(x, w, s).sum().backward()


def test_plans_are_few_and_go_with_their_structure(native_isa):
    gc.collect()
    before = len(sparse_kernels._plans)
    w, s, _ = layer("4x1", (8, 8))
    for rows in range(1, 60):
        sk.ops.sparse_linear(torch.randn(rows, 8), w, s)
    assert len(sparse_kernels._plans) == before + 1
    assert 1 < len(sparse_kernels.remembered(s.tensors)) <= 24
    again = pickle.loads(pickle.dumps(s))
    assert not sparse_kernels.remembered(again.tensors)
    del s, again
    gc.collect()
    assert len(sparse_kernels._plans) == before
