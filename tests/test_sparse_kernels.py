"""The float32 kernels of sparse_conv2d and sparse_linear on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern import _direct
from sparsekern.ops import sparse_kernels

LAST = torch.channels_last
PATTERNS = ["unstructured", "1x4", "4x1"]

# out, in, groups, kernel, size, stride, padding, dilation, batch
CASES = [
    (24, 20, 1, (1, 1), (7, 7), 1, 0, 1, 5),  # tiles span images
    (40, 36, 1, (3, 3), (14, 14), 1, 1, 1, 2),  # tiles span rows
    (8, 72, 1, (3, 3), (7, 7), 1, 1, 1, 3),
    (12, 24, 2, (1, 1), (13, 11), 1, 0, 1, 2),  # pointwise: read in place, with a short last vector
    (16, 8, 1, (1, 1), (20, 13), 2, 0, 1, 2),
    (16, 8, 2, (3, 3), (40, 60), 2, 1, 1, 1),  # many tiles; two phases of the stride
    (12, 20, 1, (5, 3), (9, 17), (3, 1), (2, 4), (2, 3), 2),  # more padding than kernel; many channels of three phases
    (8, 4, 1, (7, 7), (31, 29), 2, 3, 1, 1),
    (7, 7, 7, (3, 3), (6, 5), 1, 1, 1, 2),  # depthwise
    (4, 4, 1, (2, 2), (3, 3), 5, 2, 2, 1),  # a stride beyond the image
    (264, 12, 1, (1, 1), (13, 11), 1, 0, 1, 2),  # read often: packed, though it could be read in place; many rows
]


def block_mask(shape, pattern, sparsity):
    axis = {"4x1": 0, "1x4": 1, "block4": 1}.get(pattern)
    grid = [-(-n // 4) if d == axis else n for d, n in enumerate(shape)]
    chosen = torch.rand(grid, generator=torch.Generator().manual_seed(0)) >= sparsity
    return chosen if axis is None else chosen.repeat_interleave(4, axis).narrow(axis, 0, shape[axis])


def assert_close(found, exact, terms):
    """Sums of `terms` products of normal numbers, each rounded to float32."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-7 * (terms + 4))


@pytest.fixture
def native(backend):
    if backend == "reference":
        pytest.skip("reference: test_sparse_conv2d.py and test_sparse_linear.py compare it with torch")
    return backend


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_conv2d_agrees_with_float64_on_any_number_of_threads(native, case, pattern, threads):
    out, channels, groups, kernel, size, *geometry, batch = case
    if native == "emulated-cuda" and groups > 1:
        pytest.skip("takes torch's dense path")
    shape = (out, channels // groups, *kernel)
    torch.manual_seed(0)
    x, w, b = torch.randn(batch, channels, *size), torch.randn(shape), torch.randn(out)
    conv = sk.ops.sparse_conv2d
    for sparsity in (0.0, 0.8, 1.0):
        mask = block_mask(shape, pattern, sparsity)
        s = sk.ops.sparse_structure(mask, pattern, groups=groups)
        kept, dirty = torch.where(mask, w, 0).double(), torch.where(mask, w, torch.nan)
        exact = torch.nn.functional.conv2d(x.double(), kept, b.double(), *geometry, groups)
        for last in (False, True):
            inputs = (x.to(memory_format=LAST), dirty.to(memory_format=LAST)) if last else (x, dirty)
            threads(1)
            found = conv(*inputs, s, b, *geometry, groups)
            assert_close(found, exact, mask[0].numel())
            threads(3)
            assert torch.equal(found, conv(*inputs, s, b, *geometry, groups))
            assert found.is_contiguous(memory_format=LAST if last else torch.contiguous_format)


@pytest.mark.parametrize("size", [64, 63])  # rows of whole cache lines, and not
@pytest.mark.parametrize("pattern", PATTERNS)
def test_conv2d_beyond_the_caches(native, size, pattern, threads):
    """Large enough for results that go past the caches and for tiles that are fetched ahead."""
    x, w = torch.randn(17, 16, size, size), torch.randn(32, 16, 1, 1)
    mask = block_mask(w.shape, pattern, 0.7)
    s = sk.ops.sparse_structure(mask, pattern)
    exact = torch.nn.functional.conv2d(x.double(), torch.where(mask, w, 0).double())
    threads(1)
    found = sk.ops.sparse_conv2d(x, w, s)
    assert_close(found, exact, 16)
    threads(3)
    assert torch.equal(found, sk.ops.sparse_conv2d(x, w, s))


@pytest.mark.parametrize("rows", [1, 16, 250])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_linear_agrees_with_float64_on_any_number_of_threads(native, rows, pattern, threads):
    mask = block_mask((28, 37), pattern, 0.7)
    x, w, b = torch.randn(rows, 37), torch.randn(28, 37), torch.randn(28)
    s = sk.ops.sparse_structure(mask, pattern)
    exact = x.double() @ torch.where(mask, w, 0).double().t() + b.double()
    threads(1)
    found = sk.ops.sparse_linear(x, torch.where(mask, w, torch.nan), s, b)
    assert_close(found, exact, 37)
    threads(3)
    assert torch.equal(found, sk.ops.sparse_linear(x.t().contiguous().t(), w, s, b))


def gradients(function, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    result = function(*leaves)
    ramp = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).reshape(result.shape)
    return torch.autograd.grad(result, leaves, ramp.to(result.dtype))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_conv2d_gradients_agree_with_float64_on_any_number_of_threads(native, case, pattern, threads):
    out, channels, groups, kernel, size, *geometry, batch = case
    if native == "emulated-cuda" and groups > 1:
        pytest.skip("takes torch's dense path")
    shape = (out, channels // groups, *kernel)
    x, w = torch.randn(batch, channels, *size), torch.randn(shape)
    for sparsity in (0.0, 0.8, 1.0):
        mask = block_mask(shape, pattern, sparsity)
        s = sk.ops.sparse_structure(mask, pattern, groups=groups)
        exact = gradients(
            lambda x, w, m=mask: torch.nn.functional.conv2d(x, torch.where(m, w, 0), None, *geometry, groups),
            x.double(), w.double(),
        )  # fmt: skip
        for last in (False, True):
            layout = LAST if last else torch.contiguous_format
            inputs = [x.to(memory_format=layout), torch.where(mask, w, torch.nan).to(memory_format=layout)]
            run = lambda x, w, s=s: sk.ops.sparse_conv2d(x, w, s, None, *geometry, groups)  # noqa: E731
            threads(1)
            found = gradients(run, *inputs)
            assert_close(found[0], exact[0], out * kernel[0] * kernel[1])
            assert_close(found[1], exact[1], batch * size[0] * size[1])
            assert not found[1][~mask].any()
            threads(3)
            assert all(torch.equal(a, b) for a, b in zip(found, gradients(run, *inputs), strict=True))


@pytest.mark.parametrize("rows", [1, 250])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_linear_gradients_agree_with_float64_on_any_number_of_threads(native, rows, pattern, threads):
    mask = block_mask((28, 36), pattern, 0.7)
    x, w = torch.randn(rows, 36), torch.randn(28, 36)
    s = sk.ops.sparse_structure(mask, pattern)
    exact = gradients(lambda x, w: x @ torch.where(mask, w, 0).t(), x.double(), w.double())
    run = lambda x, w: sk.ops.sparse_linear(x, w, s)  # noqa: E731
    threads(1)
    found = gradients(run, x, torch.where(mask, w, torch.nan))
    assert_close(found[0], exact[0], 28)
    assert_close(found[1], exact[1], rows)
    threads(3)
    again = gradients(run, x, torch.where(mask, w, torch.nan))
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])


@pytest.mark.parametrize("pointers, indices", [([0, 2, 3], [0, 8, 1]), ([0, 2, 3], [1, 1, 0]), ([0, 4, 3], [0, 1, 2])])
def test_hostile_structures_raise_from_gradients(pointers, indices):
    tensors = [torch.tensor(t, dtype=torch.int32) for t in (pointers, indices)]
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 2, 2)
    for needs in ([True, False, False], [False, True, False]):
        with pytest.raises(ValueError, match="structure"):
            torch.ops.sparsekern.sparse_conv2d_backward(
                torch.randn(1, 2, 3, 3), x, w, tensors, "unstructured", [1, 1], [0, 0], [1, 1], 1, needs
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[5]])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sixteen_bits_are_summed_in_float32_and_rounded_once(native, pattern, case, dtype):
    if native == "emulated-cuda":
        pytest.skip("CUDA multiplies 16-bit numbers as they are: test_sparse_tensorcore.py")
    out, channels, groups, kernel, size, *geometry, batch = case
    shape = (out, channels // groups, *kernel)
    mask = block_mask(shape, pattern, 0.6)
    s = sk.ops.sparse_structure(mask, pattern, groups=groups)
    x, w, b = (torch.randn(n).to(dtype) for n in ((batch, channels, *size), shape, (out,)))
    for last in (False, True):
        form = LAST if last else torch.contiguous_format
        given = [x.to(memory_format=form), torch.where(mask, w, torch.nan), b]
        run = lambda x, w, b: sk.ops.sparse_conv2d(x, w, s, b, *geometry, groups)  # noqa: E731
        found, wide = run(*given), run(*(t.float() for t in given))
        assert found.dtype == dtype and found.stride() == wide.stride() and torch.equal(found, wide.to(dtype))
        grads = gradients(run, *given)
        assert [g.dtype for g in grads] == [dtype] * 3 and not grads[1][~mask].any()
        exact = gradients(run, *(t.float() for t in given))
        for got, want in zip(grads, exact, strict=True):  # the incoming gradient was rounded to `dtype` too
            torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02 * float(want.abs().amax()))
    features = torch.randn(5, 8).to(dtype), torch.where(torch.eye(8, dtype=torch.bool), 2, 0).to(dtype)
    linear = sk.ops.sparse_linear(*features, sk.ops.sparse_structure(features[1]))
    assert linear.dtype == dtype and torch.equal(linear, 2 * features[0])


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 3, 5, 8, 9)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16_images_are_read_and_written_as_they_are(native, pattern, case, threads, monkeypatch):
    if native in ("triton", "cuda", "emulated-cuda"):
        pytest.skip("of the CPU kernels, which are what is looked at")
    out, channels, groups, kernel, size, *geometry, batch = case
    shape = (out, channels // groups, *kernel)
    mask = block_mask(shape, pattern, 0.6)
    s = sk.ops.sparse_structure(mask, pattern, groups=groups)
    x, w, b = (torch.randn(n).bfloat16() for n in ((batch, channels, *size), shape, (out,)))
    x[0, 0] *= 1e-38  # denormals are numbers
    product, seen = sparse_kernels.product, []
    monkeypatch.setattr(_direct, "run", None)  # not to miss calls

    def spy(input, *rest):
        if (found := product(input, *rest)) is not None:
            seen.append(input.dtype)
        return found

    monkeypatch.setattr(sparse_kernels, "product", spy)
    for form in (torch.contiguous_format, LAST):
        image = x.to(memory_format=form)
        want = sk.ops.sparse_conv2d(image.float(), w.float(), s, b.float(), *geometry, groups).bfloat16()
        seen.clear()
        for weight, count in [(torch.where(mask, w, torch.nan), 1), (s.pack(w), 3), (s.pack(w), 1)]:
            threads(count)
            found = sk.ops.sparse_conv2d(image, weight, s, b, *geometry, groups)
            assert torch.equal(found, want) and found.is_contiguous(memory_format=form)
        assert seen == [torch.bfloat16] * 3
    tiny = torch.full((1, channels, *size), 2.0**-130).bfloat16()
    kept = sk.ops.sparse_conv2d(tiny, torch.where(mask, 1, 0).bfloat16(), s, None, *geometry, groups)
    assert kept.float().amax() >= 2.0**-130 or not mask.any()


def test_bfloat16_with_an_epilogue_rounds_each_step(native):
    s = sk.ops.sparse_structure(torch.rand(8, 4, 1, 1) < 0.5)
    x, w, b = (torch.randn(n).bfloat16() for n in ((2, 4, 5, 5), (8, 4, 1, 1), (8,)))
    with torch.no_grad():
        for _ in range(2):  # known calls too
            plain = sk.ops.sparse_conv2d(x, w, s, b)
            scaled = sk.ops.sparse_conv2d(x, w, s, b, scale=b, residual=plain, activation="relu")
            steps = sk.ops.sparse_conv2d(x, w, s) * b.reshape(-1, 1, 1) + b.reshape(-1, 1, 1)
            assert torch.equal(scaled, (steps + plain).relu())
            # The same shapes in float32 are another call.
            assert sk.ops.sparse_conv2d(x.float(), w.float(), s, b.float()).dtype == torch.float32
