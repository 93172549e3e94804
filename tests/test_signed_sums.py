"""signed_sums against float64, on every backend."""

import math

import pytest
import torch

import sparsekern as sk

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def run(backend, values, signs):
    return (sk.ops.signed_sums.reference if backend == "reference" else sk.ops.signed_sums)(values, signs)


def problem(dtype, sizes=(0, 1, 7, 16, 33, 1000, (1 << 16) + 5)):
    g = torch.Generator().manual_seed(0)
    values, signs = ([torch.randn(n, generator=g).to(dtype) for n in sizes] for _ in range(2))
    for s in signs:
        s[::3] = 0
        s[1::9] = -0.0
    return values, signs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(backend, dtype):
    values, signs = problem(dtype)
    want = torch.stack([(v.double() * s.double().sign()).sum() for v, s in zip(values, signs, strict=True)])
    found = run(backend, values, signs)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-4 if dtype != torch.float64 else 1e-10)


def test_a_sign_of_zero_leaves_out_and_others_do_not(backend):
    values = torch.tensor([math.nan, math.inf, 1.0, 2.0] * 5)
    signs = torch.tensor([0.0, -0.0, -1e-40, 3.0] * 5)
    assert run(backend, [values], [signs]).tolist() == [5.0]
    assert run(backend, [values], [signs.abs() + 1]).isnan().all()


def test_threads_and_layouts(backend):
    values, signs = problem(torch.float32, (200_000, 300_001, 5))
    one = run(backend, values, signs)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(run(backend, values, signs), one) for _ in range(5))
    finally:
        torch.set_num_threads(threads)
    v, s = torch.randn(6, 5, 3, 3), torch.randn(6, 5, 3, 3)
    want = (v * s.sign()).sum(dtype=torch.float64).reshape(1)
    for layout in (lambda t: t.to(memory_format=torch.channels_last), lambda t: t.repeat(1, 2, 1, 1)[:, :5]):
        torch.testing.assert_close(sk.ops.signed_sums([layout(v)], [s]), want, rtol=0, atol=1e-4)


def test_opcheck_and_bad_input():
    torch.library.opcheck(torch.ops.sparsekern.signed_sums.default, problem(torch.float32, (3, 9)))
    ones = torch.ones(3)
    for values, signs, words in [
        ([], [], "one at least"), ([ones], [], "as many entries"), ([ones.long()], [ones], r"values\[0\] must be"),
        ([ones], [ones.double()], r"signs\[0\] must be"), ([ones], [torch.ones(4)], r"signs\[0\] must be"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=words):
            sk.ops.signed_sums(values, signs)
