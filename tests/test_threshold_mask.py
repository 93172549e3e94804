"""threshold_mask against comparisons in float64, on every backend."""

import math

import pytest
import torch

import sparsekern as sk


def run(backend, values, threshold):
    return (sk.ops.threshold_mask.reference if backend == "reference" else sk.ops.threshold_mask)(values, threshold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, -0.25, 0.1, 1 / 3 - 1e-12, math.inf, -math.inf, 1e300])
def test_what_is_above(backend, dtype, threshold):
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=g).to(dtype) for n in (0, 1, 7, 63, 64, 65, 1000, (1 << 15) + 5)]
    edges = torch.tensor([0.0, -0.0, 0.1, 1 / 3, math.nan, -math.nan, math.inf, -math.inf, -0.25]).repeat(8)
    values.append(edges.to(dtype))
    masks, counts = run(backend, values, threshold)
    for value, mask, count in zip(values, masks, counts.tolist(), strict=True):
        want = value.double() > threshold
        assert torch.equal(mask, sk.ops.pack_mask(want)) and count == int(want.sum())
    assert counts.dtype == torch.int64


def test_any_layout():
    value = torch.randn(6, 5, 3, 3)
    for laid in (value.to(memory_format=torch.channels_last), value.repeat(1, 2, 1, 1)[:, :5], value.transpose(0, 2)):
        (mask,), _ = sk.ops.threshold_mask([laid], 0.3)
        assert torch.equal(sk.ops.unpack_mask(mask, laid), laid > 0.3)


def test_opcheck_and_bad_input():
    torch.library.opcheck(torch.ops.sparsekern.threshold_mask.default, ([torch.randn(3), torch.randn(2, 9)], 0.5))
    for values, threshold, words in [
        ([], 0.0, "values must hold at least one"), ([torch.ones(2).long()], 0.0, r"values\[0\] must be one of"),
        ([torch.ones(2)], math.nan, "threshold must be a number"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=words):
            sk.ops.threshold_mask(values, threshold)
