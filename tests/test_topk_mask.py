"""topk_mask against hand-computed oracles and against a brute-force selection that shares no code with the package.

The oracles are those of the published repositories (neuralmagic/sparseml, aojunzz/NM-sparsity) and arXiv 2308.02060.
"""

from __future__ import annotations

import itertools
import math
import random
import struct
import sys

import pytest
import torch

import sparsekern as sk

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(4, 4), (8, 8, 3, 3), (5, 7, 2, 3), (3, 6), (2, 1, 3, 3), (1, 9), (6, 5, 4)]
OP = torch.ops.sparsekern.topk_mask


@pytest.fixture(autouse=True)
def on_backend(backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr(sys.modules["sparsekern.ops.topk_mask"], "_op", sk.ops.topk_mask.reference)


def masks(scores, keep, **options):
    packed = sk.ops.topk_mask(scores, keep, **options)
    assert all(
        p.dtype == torch.uint8 and p.shape == ((s.numel() + 7) // 8,) for p, s in zip(packed, scores, strict=True)
    )
    return [sk.ops.unpack_mask(p, s) for p, s in zip(packed, scores, strict=True)]


def mask(score, keep, **options):
    return masks([score], keep, **options)[0]


def bits(score, keep, **options):
    return mask(score, keep, **options).int().flatten().tolist()


def f32(value):
    """Round a Python float to float32, to infinity beyond its range."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def brute_groups(tensor, pattern):
    """Lists of row-major weight indices, one list per group, in block order."""
    shape = list(tensor.shape)
    if pattern == "unstructured":
        return [[i] for i in range(tensor.numel())]
    axis = 0 if pattern == "4x1" else 1
    size = int(pattern.split(":")[1]) if ":" in pattern else 4
    found: dict[tuple, list[int]] = {}
    for flat, index in enumerate(itertools.product(*map(range, shape))):
        key = list(index)
        key[axis] //= size
        found.setdefault(tuple(key), []).append(flat)
    return [found[key] for key in sorted(found)]


def brute_score(values, group, magnitude, pattern):
    chosen = [abs(values[i]) if magnitude else values[i] for i in group]
    if pattern not in ("4x1", "1x4"):
        return chosen[0]
    total = f32(chosen[0])
    for value in chosen[1:]:
        total = f32(total + f32(value))
    return f32(total * 4 / len(group)) if len(group) < 4 else total


def brute(scores, keep, pattern="unstructured", magnitude=True, allowed=None):
    """Boolean masks from sorting everything in pure Python."""
    flats = [s.double().contiguous().flatten().tolist() for s in scores]
    open_ = (
        [[True] * len(f) for f in flats] if allowed is None else [a.contiguous().flatten().tolist() for a in allowed]
    )
    result = [[False] * len(f) for f in flats]
    ranked = []
    for t, score in enumerate(scores):
        for order, group in enumerate(brute_groups(score, pattern)):
            if ":" in pattern:
                best = sorted((-brute_score(flats[t], [i], magnitude, pattern), i) for i in group if open_[t][i])
                for _, i in best[: int(pattern.split(":")[0])]:
                    result[t][i] = True
            elif all(open_[t][i] for i in group):
                ranked.append((-brute_score(flats[t], group, magnitude, pattern), t, order, group))
    ranked.sort(key=lambda entry: entry[:3])
    if isinstance(keep, int):
        picked = ranked[:keep]
    else:
        picked = [e for t, k in enumerate(keep or []) for e in [r for r in ranked if r[1] == t][:k]]
    for _, t, _, group in picked:
        for i in group:
            result[t][i] = True
    return [torch.tensor(r, dtype=torch.bool).reshape(s.shape) for r, s in zip(result, scores, strict=True)]


def draw(shape, dtype, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-2, 3, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def same(found, expected):
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def groups_of(score, pattern):
    return len(brute_groups(score, pattern))


@pytest.mark.parametrize(("keep", "expected"), [(5, 5), (3, 3), (2, 2), (1, 1), (0, 0), (7, 7), (10, 10)])
def test_published_exact_counts(keep, expected):
    score = torch.tensor([5.0, 4, 3, 2, 1, 0, 0, 0, 0, 0])
    assert bits(score, keep) == [1] * expected + [0] * (10 - expected)


def test_block_score_is_a_sum_of_magnitudes():
    assert bits(torch.tensor([[1.0, 1, 1, 1, 0, 0, 0, 5]]), 1, pattern="1x4") == [0, 0, 0, 0, 1, 1, 1, 1]
    assert bits(torch.tensor([[2.0, 2, 2, 2, 0, 0, 0, 7]]), 1, pattern="block4") == [1, 1, 1, 1, 0, 0, 0, 0]
    assert bits(torch.tensor([[-2.0, 2, -2, 2, 0, 0, 0, 7]]), 1, pattern="1x4") == [1, 1, 1, 1, 0, 0, 0, 0]
    assert bits(torch.tensor([[-2.0, 2, -2, 2, 0, 0, 0, 7]]), 1, pattern="1x4", magnitude=False)[7] == 1


def test_three_input_channels_make_one_block():
    chosen = mask(torch.randn(4, 3, 3, 3), 10, pattern="1x4")
    assert chosen.sum() == 30 and torch.equal(chosen.any(1), chosen.all(1))


def test_patterns_name_out_by_in():
    score = torch.zeros(8, 8)
    score[4:, 2] = 1
    assert torch.equal(mask(score, 1, pattern="4x1"), score.bool())
    assert torch.equal(mask(score.t().contiguous(), 1, pattern="1x4"), score.t().bool())


def test_tail_block_is_scaled_to_four():
    # 4/3 * 3.1 > 4 > 3.1: only the scaled tail beats the full block.
    assert bits(torch.tensor([[1.0, 1, 1, 1, 1, 1, 1.1]]), 1, pattern="1x4") == [0, 0, 0, 0, 1, 1, 1]
    assert bits(torch.tensor([[1.0, 1, 1, 1, 1, 1]]), 1, pattern="1x4") == [1, 1, 1, 1, 0, 0]
    assert bits(torch.tensor([[1.0, 1, 1, 1, 1.5]]), 1, pattern="1x4") == [0, 0, 0, 0, 1]


def test_block_sum_rounds_in_index_order():
    # In float32 (2^24 + 1) + 1 stays 2^24, and (1 + 1) + 2^24 does not.
    big = 2.0**24
    assert bits(torch.tensor([[big, 1, 1, 0, 1, 1, big, 0]]), 1, pattern="1x4") == [0] * 4 + [1] * 4
    assert bits(torch.tensor([[big, 1, 1, 0, big, 0, 0, 0]]), 1, pattern="1x4") == [1] * 4 + [0] * 4


def test_tail_rounding_matches_exact_arithmetic():
    values = [f32(random.Random(0).uniform(0.5, 2) * 1.0000001**i) for i in range(200)]
    score = torch.tensor([[v, v / 3, v / 7] for v in values])
    for keep in range(0, 201, 10):
        assert same([mask(score, keep, pattern="1x4")], brute([score], keep, "1x4"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4"])
@pytest.mark.parametrize("magnitude", [True, False])
def test_brute_force(dtype, ties, pattern, magnitude):
    for seed, shape in enumerate(SHAPES):
        score = draw(shape, dtype, seed, ties)
        total = groups_of(score, pattern)
        for keep in sorted({0, 1, total // 3, total - total // 20, total}):
            found = mask(score, keep, pattern=pattern, magnitude=magnitude)
            assert same([found], brute([score], keep, pattern, magnitude)), (shape, keep)


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4"])
@pytest.mark.parametrize("ties", [False, True])
def test_lists(pattern, ties):
    scores = [draw(s, DTYPES[i % 4], i, ties) for i, s in enumerate(SHAPES)] + [torch.zeros(0, 4)]
    totals = [groups_of(s, pattern) for s in scores]
    for keep in (0, 1, sum(totals) // 10, sum(totals) // 2, sum(totals), [0] * 8, [t // 2 for t in totals], totals):
        assert same(masks(scores, keep, pattern=pattern), brute(scores, keep, pattern)), keep


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:1", "4:4", "3:5", "2:16"])
@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("ties", [False, True])
def test_n_of_m(pattern, magnitude, ties):
    scores = [draw(s, DTYPES[i % 4], i, ties) for i, s in enumerate(SHAPES)] + [torch.zeros(3, 0, 2)]
    assert same(masks(scores, None, pattern=pattern, magnitude=magnitude), brute(scores, None, pattern, magnitude))


def test_n_of_m_oracle():
    score = torch.tensor([[1.0, -4, 3, 2, 0, 0, 0, 0, 5, 5, 5]])
    assert bits(score, None, pattern="2:4") == [0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0]
    assert bits(torch.ones(1, 5), None, pattern="2:4") == [1, 1, 0, 0, 1]
    assert bits(torch.tensor([[-0.0, 0.0, -0.0]]), None, pattern="1:3", magnitude=False) == [1, 0, 0]


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2:4"])
def test_ties_ignore_the_memory_format(pattern):
    score = draw((6, 7, 3, 2), torch.float32, 0, True)
    keep = None if pattern == "2:4" else groups_of(score, pattern) // 2
    expected = brute([score], keep, pattern)
    transposed = score.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    sliced = torch.stack([score, score + 9], -1)[..., 0]
    for layout in (score, score.to(memory_format=torch.channels_last), transposed, sliced):
        assert same([mask(layout, keep, pattern=pattern)], expected), layout.stride()


def test_packed_in_storage_order_with_zero_padding():
    score = torch.ones(1, 2, 2, 2).to(memory_format=torch.channels_last)
    assert sk.ops.topk_mask([score], 4)[0].tolist() == [0b01010101]
    assert sk.ops.topk_mask([torch.ones(11)], 11)[0].tolist() == [255, 7]


def test_equal_scores_keep_the_lowest_indices_across_tensors():
    found = masks([torch.ones(3), torch.ones(3)], 4)
    assert [m.tolist() for m in found] == [[True] * 3, [True, False, False]]


def test_negative_zero_ties_with_zero():
    assert bits(torch.tensor([-0.0, 0.0, -0.0, 0.0]), 2, magnitude=False) == [1, 1, 0, 0]
    assert bits(torch.tensor([[-0.0] * 4 + [0.0] * 4]), 1, pattern="1x4", magnitude=False) == [1] * 4 + [0] * 4


def test_infinities_are_ordinary():
    inf = float("inf")
    assert bits(torch.tensor([1.0, -inf, inf, 2]), 2) == [0, 1, 1, 0]
    assert bits(torch.tensor([-inf, 1.0, -inf, inf]), 3, magnitude=False) == [1, 1, 0, 1]
    assert bits(torch.tensor([[1e300, 0, 0, 0, inf, 0, 0, 0]], dtype=torch.float64), 1, pattern="1x4")[0] == 1


def test_values_are_compared_without_rounding():
    assert bits(torch.tensor([1.0, 1 + 2.0**-50], dtype=torch.float64), 1) == [0, 1]
    found = masks([torch.tensor([1.0]), torch.tensor([1 + 2.0**-50], dtype=torch.float64)], 1)
    assert [m.item() for m in found] == [False, True]
    assert bits(torch.tensor([2.0**-149, 2.0**-148]), 1) == [0, 1]


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2:4"])
@pytest.mark.parametrize("magnitude", [True, False])
def test_candidates(pattern, magnitude):
    scores = [draw(s, torch.float32, i, True) for i, s in enumerate(SHAPES)]
    scores[1] = scores[1].to(memory_format=torch.channels_last)
    groups = [groups_of(s, pattern) for s in scores]
    first = None if pattern == "2:4" else [-(-g // 2) for g in groups]
    allowed = masks(
        [draw(s.shape, torch.float32, 99, False).as_strided_(s.size(), s.stride()) for s in scores],
        first,
        pattern=pattern,
    )
    allowed[0] = torch.ones_like(allowed[0])
    packed = [None, *(sk.ops.pack_mask(a) for a in allowed[1:])]
    keep = None if pattern == "2:4" else sum(first) // 2
    for count in [None] if keep is None else [0, keep, sum(first), [f // 2 for f in first], first]:
        found = masks(scores, count, pattern=pattern, magnitude=magnitude, candidates=packed)
        assert same(found, brute(scores, count, pattern, magnitude, allowed)), count
        assert all((f <= a).all() for f, a in zip(found, allowed, strict=True))


def test_candidates_beat_everything_else_even_at_minus_infinity():
    score = torch.tensor([5.0, -float("inf"), 4, -float("inf")])
    packed = [sk.ops.pack_mask(torch.tensor([False, True, False, True]))]
    assert bits(score, 1, magnitude=False, candidates=packed) == [0, 1, 0, 0]
    assert bits(score, 2, magnitude=False, candidates=packed) == [0, 1, 0, 1]
    assert bits(score[None], None, pattern="3:4", magnitude=False, candidates=packed) == [0, 1, 0, 1]


def test_partly_allowed_block_is_no_candidate():
    packed = [sk.ops.pack_mask(torch.tensor([[True, True, True, False] + [True] * 4 + [True, False]]))]
    assert bits(torch.ones(1, 10), 1, pattern="1x4", candidates=packed) == [0] * 4 + [1] * 4 + [0] * 2
    with pytest.raises(ValueError, match="keep=.2.: expected at most the number of candidate groups"):
        mask(torch.ones(1, 10), 2, pattern="1x4", candidates=packed)


def test_unchecked_shortage_keeps_all_candidates():
    packed = [sk.ops.pack_mask(torch.tensor([True, False, True]))]
    for keep in (3, [3]):
        assert bits(torch.ones(3), keep, candidates=packed, check=False) == [1, 0, 1]
        with pytest.raises(ValueError, match="candidate"):
            mask(torch.ones(3), keep, candidates=packed)


@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4", "2:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_raises(pattern, dtype):
    score = torch.ones(5, 6, dtype=dtype)
    score[4, 5] = float("nan")
    keep = None if pattern == "2:4" else 2
    with pytest.raises(ValueError, match=r"NaN in scores\[1\]"):
        masks([torch.ones(4, 4), score], keep, pattern=pattern)
    masks([score], keep, pattern=pattern, check=False)


def test_nan_raises_even_where_it_cannot_be_chosen():
    packed = [sk.ops.pack_mask(torch.tensor([True, False]))]
    for keep in (0, 1, [0]):
        with pytest.raises(ValueError, match="NaN"):
            mask(torch.tensor([1.0, float("nan")]), keep, candidates=packed)


def test_inf_minus_inf_in_a_block_is_nan():
    score = torch.tensor([[float("inf"), -float("inf"), 0, 0]])
    with pytest.raises(ValueError, match="NaN"):
        mask(score, 1, pattern="1x4", magnitude=False)
    assert bits(score, 1, pattern="1x4") == [1] * 4


def test_empty_and_scalar():
    assert sk.ops.topk_mask([], 0) == [] and sk.ops.topk_mask([], []) == []
    assert bits(torch.tensor(3.0), 1) == [1]
    for shape in [(0, 4), (4, 0), (0,)]:
        assert sk.ops.topk_mask([torch.empty(shape)], 0)[0].shape == (0,)
    for pattern, shape in itertools.product(["4x1", "1x4"], [(0, 5), (5, 0), (5, 5, 0, 2)]):
        assert sk.ops.topk_mask([torch.empty(shape)], [0], pattern=pattern)[0].shape == (0,)


def test_input_is_untouched_and_gradients_do_not_flow():
    score = torch.randn(8, 8, requires_grad=True)
    before = score.detach().clone()
    found = sk.ops.topk_mask([score], 10)[0]
    assert not found.requires_grad and torch.equal(score, before) and score._version == 0


def test_thread_count_does_not_matter():
    score, threads = draw((64, 64, 3, 3), torch.float32, 0, True), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = sk.ops.topk_mask([score], 5000)[0]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(single, sk.ops.topk_mask([score], 5000)[0])


ONE = torch.ones(4, 4)
FULL = torch.full((2,), 255, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("scores", "keep", "options", "error", "message"),
    [
        (ONE, 1, {}, TypeError, "scores is a Tensor"),
        ([ONE, 3], 1, {}, TypeError, r"scores\[1\] is a int"),
        ([ONE.int()], 1, {}, TypeError, r"scores\[0\] has dtype torch.int32"),
        ([ONE.to_sparse()], 1, {}, ValueError, r"scores\[0\] has layout"),
        ([ONE, ONE.to("meta")], 1, {}, ValueError, r"scores\[1\] is on meta"),
        ([ONE[0]], 1, {"pattern": "4x1"}, ValueError, r"scores\[0\] has 1 dim"),
        ([ONE[0]], None, {"pattern": "2:4"}, ValueError, r"scores\[0\] has 1 dim"),
        ([ONE], 17, {}, ValueError, "keep=17: expected 0 to 16"),
        ([ONE], -1, {}, ValueError, "keep=-1: expected 0 to 16"),
        ([ONE], 5, {"pattern": "1x4"}, ValueError, "keep=5: expected 0 to 4"),
        ([ONE, ONE], [16, 17], {}, ValueError, r"keep\[1\]=17: expected 0 to 16"),
        ([ONE, ONE], [1], {}, ValueError, "keep has 1 entries: expected 2"),
        ([ONE], 1.0, {}, TypeError, "keep=1.0 is a float"),
        ([ONE], True, {}, TypeError, "keep=True is a bool"),
        ([ONE], None, {}, ValueError, "keep=None"),
        ([ONE], 1, {"pattern": "2:4"}, ValueError, "keep=1: expected None"),
        ([ONE], None, {"pattern": "5:4"}, ValueError, "pattern='5:4'"),
        ([ONE], None, {"pattern": "0:4"}, ValueError, "pattern='0:4'"),
        ([ONE], 1, {"pattern": "4X1"}, ValueError, "pattern='4X1'"),
        ([ONE], 1, {"pattern": None}, ValueError, "pattern=None"),
        ([ONE], 1, {"candidates": FULL}, ValueError, "candidates: expected None or a list of 1"),
        ([ONE], 1, {"candidates": [FULL, FULL]}, ValueError, "candidates: expected None or a list of 1"),
        ([ONE], 1, {"candidates": [FULL[:1]]}, ValueError, r"candidates\[0\] has shape \(1,\)"),
        ([ONE], 1, {"candidates": [ONE.bool()]}, TypeError, r"candidates\[0\] is torch.bool"),
    ],
)
def test_clear_errors(scores, keep, options, error, message):
    with pytest.raises(error, match=message):
        sk.ops.topk_mask(scores, keep, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        (
            [torch.randn(5, 6), torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)],
            [20],
            True,
            "unstructured",
        ),
        ([torch.randn(5, 6), torch.randn(4, 3).double()], [3, 2], False, "4x1"),
        ([torch.randn(5, 6, requires_grad=True), torch.randn(4, 3)], [5], True, "1x4"),
        ([torch.randn(5, 6)], [], False, "2:4"),
        ([], [0], True, "unstructured"),
    ],
)
def test_opcheck(arguments):
    scores = arguments[0]
    torch.library.opcheck(OP.default, (*arguments, True, []))
    torch.library.opcheck(OP.default, (*arguments, False, [None] * len(scores)))
    full = [torch.full(((s.numel() + 7) // 8,), 255, dtype=torch.uint8) for s in scores]
    torch.library.opcheck(OP.default, (*arguments, True, full))


def test_reference_is_the_specification():
    score = torch.randn(8, 8)
    found, status = sk.ops.topk_mask.reference([score], [9], True, "unstructured", True, [])
    assert torch.equal(found[0], sk.ops.topk_mask([score], 9)[0])
    assert status.dtype == torch.int32 and status.shape == () and status.item() == 0


def agrees(scores, keep, pattern="unstructured", magnitude=True):
    one = isinstance(keep, int)
    arguments = (scores, [keep] if one else keep, one, pattern, magnitude, [])
    (found, status), (expected, reference_status) = OP(*arguments), sk.ops.topk_mask.reference(*arguments)
    return same(found, expected) and torch.equal(status, reference_status)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 64, 65, 1023, 1025, 32769, 100_003])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "zeros", "infinite", "close"])
def test_agrees_with_the_reference_at_every_size(size, kind):
    score = draw((size,), torch.float32, size, kind == "ties")
    if kind == "equal":
        score = torch.full((size,), -1.5)
    elif kind == "zeros":
        score = score.sign() * 0
    elif kind == "infinite":
        score[::3] = float("inf")
        score[1::3] = -float("inf")
    elif kind == "close":
        score = 1 + score.abs() * 1e-6
    for keep in sorted({0, min(1, size), size // 10, size // 2, max(size - 1, 0), size}):
        for magnitude in (True, False):
            assert agrees([score], keep, magnitude=magnitude), (keep, magnitude)


@pytest.mark.parametrize("shape", [(257, 512), (130, 257), (64, 65, 3, 3), (7, 66, 5), (4096, 12), (3, 3), (1000, 40)])
@pytest.mark.parametrize("pattern", ["4x1", "1x4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_blocks_agree_with_the_reference(shape, pattern, dtype):
    for ties in (False, True):
        scores = [draw(shape, dtype, 1, ties), draw((9, 30), torch.float32, 2, ties)]
        a, b = (groups_of(s, pattern) for s in scores)
        for keep in (0, (a + b) // 7, a + b - 1, a + b, [a // 3, b // 2], [0, b]):
            assert agrees(scores, keep, pattern, True), keep
        assert agrees(scores, a // 2, pattern, False)


@pytest.mark.parametrize("pattern", ["unstructured", "1x4"])
def test_every_thread_count_gives_the_same_masks(pattern):
    score, threads = draw((300, 1000), torch.float32, 0, True), torch.get_num_threads()
    keep = groups_of(score, pattern) // 3
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert agrees([score, score], keep, pattern)
            assert agrees([score, score], [keep, keep // 2], pattern)
    finally:
        torch.set_num_threads(threads)
