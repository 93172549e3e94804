"""The optimizer steps on CUDA, emulated, where what is pruned is known to be zero: they touch live blocks only."""

from __future__ import annotations

import emulated_cuda
import emulator
import pytest
import torch

import sparsekern as sk

pytestmark = pytest.mark.skipif(bool(emulator.obstacle()), reason=emulator.obstacle())
SGD = dict(lr=0.1, mu=0.9, dampening=0.0, weight_decay=0.01, nesterov=True, maximize=False, momentum_policy="mask")
ADAMW = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01, maximize=False)


def step(states, tensors, mask, known_zero):
    param, grad, *buffers = ([t] for t in tensors)
    if states == 1:
        count = torch.zeros(1, dtype=torch.uint8)
        sk.ops.masked_sgd_(param, grad, *buffers, [mask], count, **SGD, known_zero=known_zero)
    else:
        sk.ops.masked_adamw_(param, grad, *buffers, [mask], torch.ones(1), **ADAMW, known_zero=known_zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("states", [1, 2], ids=["masked_sgd_", "masked_adamw_"])
@pytest.mark.parametrize("offset", [0, 1])
def test_blocks_without_a_kept_weight_are_left_alone(states, dtype, offset):
    """Dead memory holds sevens, its gradient NaN: nothing of it may change or get into what is live, which steps as
    the short tensor of what is kept does, and no other block of 16 bytes is written."""
    torch.manual_seed(0)
    lanes = 16 // dtype.itemsize
    n = 2 * 256 * 2 * lanes + 3 * lanes + 1  # two chunks by vectors, and a tail
    keep = (torch.rand(-(-n // lanes)) < 0.2).repeat_interleave(lanes)[:n]
    values = [torch.rand(n).to(dtype) for _ in range(2 + states)]
    tensors = [torch.zeros(n + offset, dtype=dtype)[offset:] for _ in values]  # by one element: no vectors
    for i, (t, v) in enumerate(zip(tensors, values, strict=True)):
        t.copy_(torch.where(keep, v, torch.nan if i == 1 else 7))
    short = [t[keep].clone() for t in tensors]
    with emulated_cuda.installed(2):
        step(states, tensors, sk.ops.pack_mask(keep), [True])
        step(states, short, None, None)
    for i, (t, s) in enumerate(zip(tensors, short, strict=True)):
        assert torch.equal(t[keep], s) and (i == 1 or (t[~keep] == 7).all())
    assert not torch.equal(short[0], values[0][keep])
