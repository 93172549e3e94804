"""topk_mask against hand-computed oracles and against a brute-force selection that shares no code with the package.

The oracles are those of the published repositories (neuralmagic/sparseml, aojunzz/NM-sparsity) and arXiv 2308.02060.
"""

from __future__ import annotations

import itertools
import random
import sys

import pytest
import torch
from topk_oracle import DTYPES, SHAPES, bits, brute, draw, f32, groups_of, layouts, mask, masks, same

import sparsekern as sk


@pytest.fixture(autouse=True)
def on_backend(backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr(sys.modules["sparsekern.ops.topk_mask"], "OP", sk.ops.topk_mask.reference)


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
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4"])
def test_brute_force(dtype, pattern):
    for seed, (shape, ties, magnitude) in enumerate(itertools.product(SHAPES, [False, True], [False, True])):
        score = draw(shape, dtype, seed, ties)
        total = groups_of(score, pattern)
        for keep in sorted({0, 1, total // 3, total - 1, total}):
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
    for shape in ((6, 7, 3, 2), (9, 5), (1, 5, 2, 3), (5, 1, 3, 2)):
        score = draw(shape, torch.float32, 0, True)
        for share in (2, 3, 5):
            keep = None if pattern == "2:4" else groups_of(score, pattern) // share
            expected = brute([score], keep, pattern)
            for layout in layouts(score):
                assert same([mask(layout, keep, pattern=pattern)], expected), (layout.shape, layout.stride(), keep)


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
