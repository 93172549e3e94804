"""sparse_conv2d at random: any geometry, pattern and layout agrees with torch; any structure is right or refused.

Cases are drawn from seeds, so a failure can be run again by its number.
"""

from __future__ import annotations

import random

import pytest
import torch

import sparsekern as sk

FORMATS = [torch.contiguous_format, torch.channels_last]


def draw(seed):
    """Operands, the mask and the geometry of one case."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    groups = rng.choice([1, 1, 1, 2, 3])
    out, channels = groups * rng.choice([1, 2, 4, 8, 20]), groups * rng.choice([1, 3, 4, 8, 36])
    kernel = rng.choice([(1, 1), (1, 1), (3, 3), (2, 3), (5, 1), (7, 7)])
    stride, dilation = ([rng.randint(1, 3) for _ in range(2)] for _ in range(2))
    stride, dilation = rng.choice([[1, 1], stride]), rng.choice([[1, 1], dilation])
    padding = [rng.randint(0, 3) for _ in range(2)]
    least = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [max(n, 1) + rng.choice([0, 1, 6, 13, 30]) for n in least]
    pattern, shape = rng.choice(["unstructured", "4x1", "1x4"]), (out, channels // groups, *kernel)
    axis = {"4x1": 0, "1x4": 1}.get(pattern)
    grid = [-(-n // 4) if d == axis else n for d, n in enumerate(shape)]
    mask = torch.rand(grid) >= rng.choice([0, 0.5, 0.9, 0.99, 1])
    mask = mask if axis is None else mask.repeat_interleave(4, axis).narrow(axis, 0, shape[axis])
    x, w = torch.randn(rng.choice([1, 2, 5]), channels, *size), torch.randn(shape)
    x, w = x.to(memory_format=rng.choice(FORMATS)), w.to(memory_format=rng.choice(FORMATS))
    if rng.random() < 0.2:
        x = torch.nn.functional.pad(x, (0, 2))[..., :-2]  # a view with gaps
    bias = torch.randn(out) if rng.random() < 0.5 else None
    return x, w, bias, mask, pattern, (stride, padding, dilation, groups)


@pytest.mark.parametrize("seed", range(120))
def test_agrees_with_torch(seed):
    x, w, bias, mask, pattern, geometry = draw(seed)
    structure = sk.ops.sparse_structure(mask, pattern, groups=geometry[-1])
    a, b = x.detach().requires_grad_(), torch.where(mask, w, torch.nan).requires_grad_()
    found = sk.ops.sparse_conv2d(a, b, structure, bias, *geometry)
    c, d = x.double().requires_grad_(), w.double().requires_grad_()
    exact_bias = None if bias is None else bias.double()
    want = torch.nn.functional.conv2d(c, torch.where(mask, d, 0), exact_bias, *geometry)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6 * (mask[0].numel() + 4))
    g = torch.randn_like(want)
    grads, exact = torch.autograd.grad(found, (a, b), g.float()), torch.autograd.grad(want, (c, d), g)
    for got, right, terms in zip(grads, exact, (mask[:, 0].numel(), want[:, 0].numel()), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-6 * (terms + 4))
    assert not grads[1][~mask].any()
    with torch.no_grad():
        packed = structure.pack(torch.where(mask, w, torch.nan))
        for _ in range(2):  # a first call, and one that is known
            assert torch.equal(sk.ops.sparse_conv2d(x, packed, structure, bias, *geometry), found)


@pytest.mark.parametrize("seed", range(120))
def test_a_structure_is_right_or_refused(seed):
    """One number of a structure is made another, which the bare operators must notice before they follow it."""
    x, w, _, mask, pattern, geometry = draw(seed)
    rng = random.Random(seed)
    structure = sk.ops.sparse_structure(mask, pattern, groups=geometry[-1])
    tensors = [t.clone() for t in structure.tensors]
    changed = rng.choice([t for t in tensors if t.numel()])
    changed[rng.randrange(changed.numel())] = rng.choice([-1, 0, 1, 7, 2**20, 2**31 - 1, -(2**31)])
    rest = structure.layout, *geometry
    try:
        want = torch.ops.sparsekern.sparse_conv2d.default(x.double(), w.double(), tensors, rest[0], None, *rest[1:])
    except (ValueError, RuntimeError):  # the reference refuses it: so must all passes of the kernels
        grad = torch.randn(torch.nn.functional.conv2d(x, w, None, *geometry).shape)
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.sparsekern.sparse_conv2d(x, w, tensors, rest[0], None, *rest[1:])
        for needs in ([True, False, False], [False, True, False]):
            with pytest.raises((ValueError, RuntimeError)):
                torch.ops.sparsekern.sparse_conv2d_backward(grad, x, w, tensors, *rest, needs)
        return
    found = torch.ops.sparsekern.sparse_conv2d(x, w, tensors, rest[0], None, *rest[1:])
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6 * (mask[0].numel() + 4))
