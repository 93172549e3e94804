"""masked_combine_ against values computed element by element, on every backend."""

import copy
import math

import pytest
import torch

import sparsekern as sk

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, 8, 15, 16, 17, 33, 1000, (1 << 15) + 5]
# (live, pruned): forward weights, something on what is pruned, something put back, everything at once.
FACTORS = [((1, 0), (0, 0)), ((1, 0), (1, 0.3)), ((1, 0.1), (1, 0.7)), ((1, 0), (0, 1)), ((-2, 0.3), (0, 0.7))]


def run(backend, *args, **options):
    (sk.ops.masked_combine_.reference if backend == "reference" else sk.ops.masked_combine_)(*args, **options)


def problem(dtype, sizes=SIZES):
    g = torch.Generator().manual_seed(0)
    first, second = ([torch.randn(n, generator=g).to(dtype) for n in sizes] for _ in range(2))
    masks = [sk.ops.pack_mask(torch.rand(n, generator=g) < 0.4) for n in sizes]
    masks[-2] = None
    return [torch.full_like(t, math.nan) for t in first], first, second, masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("more", ["", "times", "magnitude within"])
def test_backends_agree_with_python_bit_for_bit(backend, dtype, factors, scale, more):
    outputs, first, second, masks = problem(dtype)
    extra = {}
    if more:
        extra = {"times": [t.roll(1) for t in first], "magnitude": "magnitude" in more}
        extra["within"] = [None if m is None else m.bitwise_not() for m in masks] if "within" in more else []
    run(backend, outputs, first, second, masks, live=factors[0], pruned=factors[1],
        scale=None if scale is None else torch.tensor(scale), **extra)  # fmt: skip
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for n, (out, x, y, mask) in enumerate(zip(outputs, first, second, masks, strict=True)):
        keep = [True] * len(x) if mask is None else sk.ops.unpack_mask(mask, x).tolist()
        inside = [True] * len(x)
        if extra.get("within") and extra["within"][n] is not None:
            inside = sk.ops.unpack_mask(extra["within"][n], x).tolist()
        for i in [*range(min(len(x), 40)), *range(max(40, len(x) - 20), len(x))]:
            a, b = factors[0] if keep[i] else factors[1]
            p, q = x[i].to(compute) * a, y[i].to(compute) * b
            if more:
                q = q * (abs(extra["times"][n][i]) if extra["magnitude"] else extra["times"][n][i]).to(compute)
            q = q if scale is None else q * scale
            want = p + q if a and b else p if a else q if b else torch.zeros((), dtype=compute)
            assert out[i] == (want.to(dtype) if inside[i] else 0), i


def test_powers_of_special_values(backend):
    """x |x| keeps the sign of a zero; what `within` leaves out is +0 whatever it was."""
    x = torch.tensor([0.0, -0.0, -math.inf, -2.0, 3.0, math.nan, -5.0, 1e-30] * 3)
    within = torch.tensor([True] * 4 + [False] * 4).repeat(3)
    out = torch.empty(24)
    run(backend, [out], [x], [x], [None], live=(0, 1), pruned=(0, 0), times=[x], magnitude=True,
        within=[sk.ops.pack_mask(within)])  # fmt: skip
    want = [0.0, -0.0, -math.inf, -4.0, 0.0, 0.0, 0.0, 0.0] * 3
    assert out.tolist() == want and [math.copysign(1, v) for v in out] == [math.copysign(1, v) for v in want]


def test_large_outputs_with_memory_of_their_own(backend):
    # Written past the caches from 2^18 float32 on, where they lie on a border of 64 bytes.
    outputs, first, second, masks = problem(torch.float32, [7, (1 << 18) + 21, (1 << 18) + 3])
    outputs[2] = torch.full((outputs[2].numel() + 1,), math.nan)[1:]
    want = [torch.empty_like(t) for t in first]
    sk.ops.masked_combine_.reference(want, first, second, masks, live=(1, 0.5), pruned=(0, 1))
    run(backend, outputs, first, second, masks, live=(1, 0.5), pruned=(0, 1))
    torch.testing.assert_close(outputs, want, rtol=0, atol=0)


def test_what_is_left_out_reaches_nothing(backend):
    bad = torch.tensor([math.nan, math.inf, 1.0, math.nan])
    mask = sk.ops.pack_mask(torch.tensor([False, False, True, False]))
    for first, second, live, pruned in [
        (bad, [], (1, 0), (0, 0)), (bad, [torch.ones(4)], (1, 0), (0, 1)), (torch.ones(4), [bad], (1, 1), (1, 0)),
    ]:  # fmt: skip
        out = torch.empty(4)
        run(backend, [out], [first], [second[0]] if second else [], [mask], live=live, pruned=pruned)
        assert out.isfinite().all() and out[2] == (2.0 if live[1] else 1.0)


@pytest.mark.parametrize("of", ["first", "second", "times"])
def test_in_place_and_stale_tensors_are_noticed(backend, of):
    _, first, second, masks = problem(torch.float32, [*SIZES, 1 << 18])
    operands = {"first": first, "second": second, "times": [t.roll(1) for t in first]}
    want = [torch.empty_like(t) for t in first]
    run(backend, want, masks=masks, live=(1, 0.5), pruned=(0, 1), **operands)
    target = operands[of]
    before = [t._version for t in target]
    sk.ops.masked_combine_(target, masks=masks, live=(1, 0.5), pruned=(0, 1), **operands)
    torch.testing.assert_close(target, want, rtol=0, atol=0)
    assert all(t._version > b for t, b in zip(target, before, strict=True))


def test_any_layout(backend):
    g = torch.Generator().manual_seed(1)
    plain = torch.randn(6, 5, 3, 3, generator=g)
    keep = torch.rand(plain.shape, generator=g) < 0.5
    want = torch.where(keep, plain, 2 * plain)
    for out in (
        torch.empty(6, 5, 3, 3).to(memory_format=torch.channels_last), torch.empty(6, 10, 3, 3)[:, ::2],
        torch.empty(3, 3, 5, 6).permute(3, 2, 1, 0),
    ):  # fmt: skip
        bits = sk.ops.pack_mask(torch.empty_like(out, dtype=torch.bool).copy_(keep))
        for x in (plain, plain.to(memory_format=torch.channels_last)):
            out.fill_(math.nan)
            sk.ops.masked_combine_([out], [x], [plain], [bits], live=(1, 0), pruned=(1, 1))
            assert torch.equal(out, want)


def test_opcheck():
    outputs, first, second, masks = problem(torch.float32, [3, 17, 9])
    for live, pruned in FACTORS:
        args = copy.deepcopy((outputs, first, second, masks))
        torch.library.opcheck(
            torch.ops.sparsekern.masked_combine_.default, args,
            dict(live=list(live), pruned=list(pruned), scale=None, times=second, magnitude=True, within=masks),
        )  # fmt: skip


def test_bad_input_is_named():
    w, bits = torch.ones(9), torch.zeros(2, dtype=torch.uint8)
    good = dict(outputs=[torch.zeros(9)], first=[w], second=[w], masks=[bits], live=(1, 1), pruned=(0, 0))
    for change, words in [
        ({"first": []}, "first must have one entry for each of the 1 outputs, got 0"),
        ({"second": []}, "second must have one entry"),
        ({"masks": []}, "masks must have one entry"),
        ({"masks": [bits[:1]]}, r"masks\[0\] must be contiguous uint8 of shape \(2,\)"),
        ({"live": (1,)}, "live must be two coefficients"),
        ({"times": [w, w]}, "times must have one entry"),
        ({"times": [w.double()]}, r"times\[0\] must be torch.float32"),
        ({"within": [None, None]}, "within must have one entry"),
        ({"within": [bits[:1]]}, r"within\[0\] must be contiguous uint8 of shape \(2,\)"),
        ({"first": [w.double()]}, r"first\[0\] must be torch.float32"),
        ({"second": [w[:8]]}, r"second\[0\] must be .* of shape \(9,\)"),
        ({"outputs": [torch.zeros(1).expand(9)]}, r"outputs\[0\] must have memory for each element"),
        ({"outputs": [torch.zeros(9).long()]}, r"outputs\[0\] must be one of"),
        ({"scale": torch.ones(2)}, "scale must be one float32 or float64 number"),
    ]:
        with pytest.raises((ValueError, TypeError), match=words):
            sk.ops.masked_combine_(**{**good, **change})
        assert not good["outputs"][0].any()
    both = torch.zeros(18)
    with pytest.raises(ValueError, match=r"outputs\[0\] overlaps the memory of first\[0\]|first\[0\] overlaps"):
        sk.ops.masked_combine_([both[:9]], [both[4:13]], [], [bits], live=(1, 0), pruned=(0, 0))
