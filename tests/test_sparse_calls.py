"""Plans that are kept, and calls that skip what they were checked for before."""

from __future__ import annotations

import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_sparse_packed import layer
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern import _direct, _library
from sparsekern.ops import sparse_calls, sparse_kernels


@pytest.fixture(params=["direct", "dispatched"])
def native_isa(request, monkeypatch):
    """Compiled kernels, reached in one of two ways; tests may change the instruction set."""
    if not _library.kernels_loaded:
        pytest.skip("no compiled kernels")
    if request.param == "dispatched":
        monkeypatch.setattr(_direct, "find", None)
        monkeypatch.setattr(_direct, "run", None)
    elif _direct.find is None:
        pytest.skip(f"no direct calls: {_direct.obstacle}")
    before = torch.ops.sparsekern.cpu_isa()
    yield before
    torch.ops.sparsekern.set_cpu_isa(before)


def test_repeated_calls_see_new_values_structures_and_instruction_sets(native_isa):
    w, s, mask = layer("unstructured")
    x, bias = torch.randn(2, 8, 6, 6), torch.randn(8)

    def agrees(mask):
        for b in (None, bias):
            added = None if b is None else b.double()
            want = torch.nn.functional.conv2d(x.double(), torch.where(mask, w, 0).double(), added, 1, 1)
            for asked in (True, True, False, False, True):
                found = sk.ops.sparse_conv2d(x.requires_grad_(asked), w, s, b, 1, 1)
                torch.testing.assert_close(found, want.float())
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
    s.tensors[0][0] = 1
    with pytest.raises(ValueError, match="structure"):
        sk.ops.sparse_conv2d(x, w, s, None, 1, 1)
    s.tensors[0][0] = 0
    agrees(s.mask())
    s.tensors[1][0] = 500
    with pytest.raises(ValueError, match="structure"):
        sk.ops.sparse_conv2d(x, w, s, None, 1, 1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_only_plain_unwatched_calls_are_short(native_isa, monkeypatch):
    w, s, _ = layer("4x1")
    x = torch.randn(1, 8, 5, 5)
    went = []
    repeat = sparse_calls.repeat
    monkeypatch.setattr(sparse_calls, "repeat", lambda *a: (went.append(repeat(*a)), went[-1])[1])
    run = lambda *rest, x=x: (sk.ops.sparse_conv2d(x, w, s, *rest), went[-1] is not None)[1]  # noqa: E731
    assert [run(), run(), run(x=x[..., :4, :]), run(x=x[..., :4, :]), run()] == [False, True, False, False, True]
    assert [run(x=x[..., :4, :].clone()), run(), run(x=x[..., :4, :].clone())] == [False, True, True]
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
    with FlopCounterMode(display=False), torch.no_grad():
        assert not run()
    w.requires_grad_(False)
    with pytest.raises(RuntimeError, match="Batching rule"):  # torch has none for operators on lists of tensors
        torch.func.vmap(lambda x: sk.ops.sparse_conv2d(x, w, s))(torch.stack([x, 2 * x]))
    went.clear()
    with pytest.raises(RuntimeError, match="setup_context"):  # nor has it gradients of these
        torch.func.grad(lambda x: sk.ops.sparse_conv2d(x, w, s).sum())(x)
    torch.func.functionalize(lambda x: sk.ops.sparse_conv2d(x, w, s))(x)
    assert went == [None, None]
    traced = torch.jit.trace(lambda x: sk.ops.sparse_conv2d(x, w, s), (x,), check_trace=False)
    assert went[-1] is None and torch.equal(traced(-x), sk.ops.sparse_conv2d(-x, w, s))
    assert run()


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
    turned = ramp.transpose(2, 3).contiguous().transpose(2, 3)  # lies differently
    known = [(False, ramp), (True, ramp), (True, turned), (True, ramp)]
    cases = [(isa, isa, *case) for isa in (native_isa, "scalar", native_isa) for case in known]
    cases.append((native_isa, "scalar", True, ramp))
    for forward, backward, again, grad in cases:
        torch.ops.sparsekern.set_cpu_isa(forward)
        result = sk.ops.sparse_conv2d(given[0], given[1], s, given[2], 2, 1)
        assert not again or type(result.grad_fn).__name__.startswith("SparseProduct")
        torch.ops.sparsekern.set_cpu_isa(backward)
        result.backward(grad)
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


def test_repeated_calls_refuse_a_bias_that_the_first_refuses(native_isa):
    w, s, mask = layer("4x1")
    x, bias = torch.randn(1, 8, 5, 5), torch.randn(16)
    want = torch.nn.functional.conv2d(x, torch.where(mask, w, 0), bias[::2])
    for half in (False, True):
        given = [t.bfloat16() if half else t for t in (x, w)]
        for _ in range(3):
            for wrong, message in [(bias.to(given[0]), "shape"), (bias[:8].double(), "dtype"), ([1.0] * 8, "list")]:
                with pytest.raises((TypeError, ValueError), match=f"bias (is a|has) {message}"):
                    sk.ops.sparse_conv2d(*given, s, wrong)
            found = sk.ops.sparse_conv2d(*given, s, bias[::2].to(given[0].dtype))
            torch.testing.assert_close(found.float(), want, rtol=0.1 * half + 1e-5, atol=0.1 * half + 1e-5)
    assert len(s.calls) == 2, "a call that goes the long way each time is kept once"


def test_the_bias_of_a_single_output_may_have_any_stride(native_isa):
    w, s, mask = layer("unstructured", (1, 8, 1, 1))
    x, bias = torch.randn(1, 8, 5, 5), torch.randn(2)[::2]
    for _ in range(3):
        want = torch.nn.functional.conv2d(x, torch.where(mask, w, 0), bias)
        torch.testing.assert_close(sk.ops.sparse_conv2d(x, w, s, bias), want)


def test_tensors_that_do_not_hold_their_values(native_isa):
    w, s, mask = layer("unstructured")
    x, bias = torch.randn(1, 8, 5, 5), torch.randn(8)
    want = torch.nn.functional.conv2d(x, torch.where(mask, w, 0), bias)
    for _ in range(3):
        for form in (lambda t: t, lambda t: torch._neg_view(-t)):
            found = sk.ops.sparse_conv2d(form(x), form(w), s, form(bias))
            torch.testing.assert_close(found, want)
        nothing = sk.ops.sparse_conv2d(torch._efficientzerotensor(x.shape), w, s, bias)
        torch.testing.assert_close(nothing, bias[:, None, None].expand_as(want))


def test_repeated_calls_in_inference_mode_and_in_sight_of_a_profiler(native_isa):
    w, s, _ = layer("4x1")
    x = torch.randn(1, 8, 5, 5)
    want = sk.ops.sparse_conv2d(x, w, s)
    with torch.inference_mode():
        found = [sk.ops.sparse_conv2d(x, w, s) for _ in range(3)]
    assert all(torch.equal(f, want) and f.is_inference() for f in found)
    with torch.profiler.profile() as seen:
        assert torch.equal(sk.ops.sparse_conv2d(x, w, s), want)
    assert any(event.name.startswith("sparsekern::") for event in seen.events())
    with torch.inference_mode():
        made = layer("4x1")[1]
        for _ in range(3):
            assert torch.equal(sk.ops.sparse_conv2d(x, w, made), want)


def test_repeated_calls_of_several_threads(native_isa):
    w, s, _ = layer("4x1", (64, 64, 3, 3))
    images = [torch.randn(1, 64, 28, 28) for _ in range(8)]
    want = [sk.ops.sparse_conv2d(x, w, s, None, 1, 1) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = pool.map(lambda x: sk.ops.sparse_conv2d(x, w, s, None, 1, 1), images)
            assert all(map(torch.equal, found, want))


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
