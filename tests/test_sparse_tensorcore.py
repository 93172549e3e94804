"""float16 and bfloat16 on tensor cores, emulated: 4x1 blocks, against float64."""

from __future__ import annotations

import warnings

import emulated_cuda
import emulator
import pytest
import torch
from test_sparse_kernels import block_mask

import sparsekern as sk
from sparsekern.ops import sparse_cuda

LAST = torch.channels_last
DTYPES = [torch.float16, torch.bfloat16]
pytestmark = pytest.mark.skipif(bool(emulator.obstacle()), reason=emulator.obstacle())


@pytest.fixture(autouse=True)
def dense_path_is_an_error(monkeypatch):
    monkeypatch.setattr(sparse_cuda, "_told", set())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sparse_.* on CUDA runs as a dense operator")
        warnings.filterwarnings("ignore", "sparse_.* of the input on CUDA runs as a dense operator")
        yield


def assert_close(found, exact, terms):
    """Sums in float32 of `terms` products of normal numbers, and one rounding to 16 bits."""
    half_step = torch.finfo(found.dtype).eps / 2
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * half_step, atol=2e-7 * (terms + 4))


def layer(shape, dtype, sparsity=0.8):
    """A weight with NaN off its mask, its mask and its structure."""
    torch.manual_seed(0)
    mask = block_mask(shape, "4x1", sparsity)
    w = torch.where(mask, torch.randn(shape), torch.nan).to(dtype)
    return w, mask, sk.ops.sparse_structure(mask, "4x1")


# Out, in, kernel, size, stride, padding, dilation, batch: three blocks of threads and a tail along every dimension of
# the grid, three slabs of channels, a band that has one row of blocks.
CASES = [
    (132, 68, 3, (9, 10), 1, 1, 1, 9),
    (132, 36, 3, (11, 13), 2, 1, 1, 9),
    (132, 68, 1, (9, 10), 1, 0, 1, 9),
    (132, 68, 1, (9, 10), 2, 0, 1, 9),
    (20, 7, (2, 5), (9, 17), (1, 2), (1, 2), (3, 1), 3),  # an odd number of channels, rows unlike columns
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_order_of_threads_gives_the_same_right_result(case, dtype):
    out, channels, kernel, size, *geometry, batch = case
    w, mask, s = layer((out, channels, *([kernel] * 2 if isinstance(kernel, int) else kernel)), dtype)
    x, b = torch.randn(batch, channels, *size).to(dtype).to(memory_format=LAST), torch.randn(out).to(dtype)
    exact = torch.nn.functional.conv2d(x.double(), torch.where(mask, w, 0).double(), b.double(), *geometry)
    results = []
    for order in (0, 1, 2):
        with emulated_cuda.installed(order):
            results.append(sk.ops.sparse_conv2d(x, w, s, b, *geometry))
    assert_close(results[0], exact, mask[0].numel())
    assert results[0].is_contiguous(memory_format=LAST)
    assert all(torch.equal(again, results[0]) for again in results[1:])


def weight_gradient(run, x, w, grad):
    """Of a function of an input and a weight."""
    w = w.detach().clone().requires_grad_()
    return torch.autograd.grad(run(x, w), w, grad)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_order_of_threads_gives_the_same_right_gradient(case, dtype):
    out, channels, kernel, size, *geometry, batch = case
    w, mask, s = layer((out, channels, *([kernel] * 2 if isinstance(kernel, int) else kernel)), dtype)
    x = torch.randn(batch, channels, *size).to(dtype).to(memory_format=LAST)
    dense = lambda x, w: torch.nn.functional.conv2d(x, w, None, *geometry)  # noqa: E731
    grad = torch.randn_like(dense(x.float(), w.float()).to(dtype))
    exact = weight_gradient(dense, x.double(), w.double(), grad.double())
    results = []
    for order in (0, 1, 2):
        with emulated_cuda.installed(order):
            results.append(weight_gradient(lambda x, w: sk.ops.sparse_conv2d(x, w, s, None, *geometry), x, w, grad))
    assert_close(results[0], torch.where(mask, exact, 0), grad[:, 0].numel())
    assert all(torch.equal(again, results[0]) for again in results[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_gradients_of_any_density_weight_and_memory_format(sparsity, dtype):
    w, mask, s = layer((72, 20, 3, 3), dtype, sparsity)  # two blocks of threads, 12 steps of columns where all are kept
    x, grad = torch.randn(2, 20, 6, 5).to(dtype), torch.randn(2, 72, 6, 5).to(dtype)
    exact = weight_gradient(lambda x, w: torch.nn.functional.conv2d(x, w, None, 1, 1), x.double(), w.double(), grad)
    with emulated_cuda.installed(1):
        run = lambda x, w, form=LAST: weight_gradient(  # noqa: E731
            lambda x, w: sk.ops.sparse_conv2d(x, w, s, None, 1, 1), x, w, grad.to(memory_format=form)
        )
        found, packed = run(x, w), run(x, s.pack(w))
        assert torch.equal(run(x.to(memory_format=LAST), w.to(memory_format=LAST), torch.contiguous_format), found)
    assert_close(found, torch.where(mask, exact, 0), 60)
    assert not found[~mask].any() and torch.equal(packed, s.pack(found))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9, 530])
def test_gradients_of_linear(rows, dtype):
    w, mask, s = layer((68, 44), dtype, 0.7)
    x, grad = torch.randn(rows, 44).to(dtype).requires_grad_(), torch.randn(rows, 68).to(dtype)
    w.requires_grad_()
    with emulated_cuda.installed(2):
        slopes = torch.autograd.grad(sk.ops.sparse_linear(x, w, s), (x, w), grad)
    kept = torch.where(mask, w, 0).double()
    assert_close(slopes[0], grad.double() @ kept, 68)
    assert_close(slopes[1], torch.where(mask, grad.double().t() @ x.double(), 0), rows)


def test_a_block_of_threads_takes_tile_after_tile():
    w, mask, s = layer((260, 260), torch.bfloat16, 0.9)  # in 45 blocks of threads, so that 13 tiles are split in 11
    x, grad = torch.randn(3100, 260).bfloat16(), torch.randn(3100, 260).bfloat16()
    with emulated_cuda.installed(2):
        found = weight_gradient(lambda x, w: sk.ops.sparse_linear(x, w, s), x, w, grad)
    assert_close(found, torch.where(mask, grad.double().t() @ x.double(), 0), 3100)


def test_infinite_pixels_reach_no_gradient_that_they_are_no_part_of():
    w, mask, s = layer((4, 3, 3, 3), torch.float16, 0.0)
    x, grad = torch.randn(1, 3, 11, 11).half(), torch.randn(1, 4, 9, 9).half()
    x[..., -1, -1] = torch.inf  # of the last output alone, and beside pixels of a tile that are not there
    dense = weight_gradient(torch.nn.functional.conv2d, x.float(), w.float(), grad.float())
    assert dense.isfinite().sum() == 4 * 3 * 8
    with emulated_cuda.installed():
        found = weight_gradient(lambda x, w: sk.ops.sparse_conv2d(x, w, s), x, w, grad)
    torch.testing.assert_close(found.float(), dense, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_any_density_weight_and_memory_format(sparsity, dtype):
    w, mask, s = layer((24, 12, 3, 3), dtype, sparsity)
    x = torch.randn(2, 12, 6, 5).to(dtype)
    exact = torch.nn.functional.conv2d(x.double(), torch.where(mask, w, 0).double(), None, 1, 1)
    with emulated_cuda.installed(1):
        found = sk.ops.sparse_conv2d(x, w, s, None, 1, 1)
        assert torch.equal(found, sk.ops.sparse_conv2d(x, w.to(memory_format=LAST), s, None, 1, 1))
        assert torch.equal(found, sk.ops.sparse_conv2d(x, s.pack(w), s, None, 1, 1))
        assert torch.equal(found, sk.ops.sparse_conv2d(x.to(memory_format=LAST), w, s, None, 1, 1))
    assert found.is_contiguous()
    assert_close(found, exact, mask[0].numel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9, 130])
def test_linear(rows, dtype):
    w, mask, s = layer((68, 44), dtype, 0.7)
    x, b = torch.randn(rows, 44).to(dtype), torch.randn(68).to(dtype)
    with emulated_cuda.installed(2):
        found = sk.ops.sparse_linear(x, w, s, b)
    assert_close(found, x.double() @ torch.where(mask, w, 0).double().t() + b.double(), 44)


def test_one_result_that_float16_cannot_hold_is_infinite_and_no_other():
    w, mask, s = layer((8, 4, 1, 1), torch.float16, 0.0)
    x = torch.zeros(1, 4, 3, 3, dtype=torch.float16)
    x[0, :, 1, 1] = 6e4
    w = torch.full_like(w, 2)
    with emulated_cuda.installed():
        found = sk.ops.sparse_conv2d(x, w, s)
    assert found.isinf().sum() == 8 and found[:, :, 1, 1].isinf().all()


@pytest.mark.parametrize("pattern", ["1x4", "unstructured", "4x1"])
def test_other_patterns_and_gradients_are_dense_and_say_so(pattern):
    x, w = torch.randn(2, 8, 5, 5).half().requires_grad_(), torch.randn(8, 8, 3, 3).half()
    s = sk.ops.sparse_structure(w, pattern)
    exact = torch.nn.functional.conv2d(x, w, None, 1, 1)
    (slope,) = torch.autograd.grad(exact.sum(), x)
    with emulated_cuda.installed(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = sk.ops.sparse_conv2d(x, w, s, None, 1, 1)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], slope)
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=2e-3)
    texts = [str(t.message) for t in told if "runs as a dense operator" in str(t.message)]
    assert len(texts) == 1  # a reason is said once
    said = ("sparse_conv2d_backward of the input on", "that kernel is float32")
    first, why = said if pattern == "4x1" else ("sparse_conv2d on", "the sparse kernels are float32, and")
    assert texts[0].startswith(first) and f"torch.float16: {why}" in texts[0]
