"""Compiled topk_mask kernels against the reference, bit for bit, on sizes that brute force cannot reach."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import EMULATED
from topk_oracle import draw, groups_of, layouts, same

import sparsekern as sk

OP = torch.ops.sparsekern.topk_mask
REFERENCE = sk.ops.topk_mask.reference
SAMPLED = 600_011
"""Groups enough for the one-pass selection; not a multiple of anything."""


pytestmark = [
    pytest.mark.parametrize("backend", ["scalar", "avx2", "avx512", EMULATED], indirect=True),
    pytest.mark.usefixtures("backend"),
]


def agrees(scores, keep, pattern="unstructured", magnitude=True, candidates=(), expected=None):
    one = isinstance(keep, int)
    counts = [] if keep is None else [keep] if one else keep
    arguments = (scores, counts, one, pattern, magnitude, list(candidates))
    (found, status), (wanted, wanted_status) = OP(*arguments), expected or REFERENCE(*arguments)
    return same(found, wanted) and torch.equal(status, wanted_status)


@pytest.mark.parametrize("size", [1, 7, 64, 65, 1025, 9000])
def test_agrees_at_every_size(size):
    normal = draw((size,), torch.float32, size, False)
    infinite = normal.clone()
    infinite[::3] = float("inf")
    infinite[1::3] = -float("inf")
    kinds = [normal, draw((size,), torch.float32, size, True), torch.full((size,), -1.5), normal.sign() * 0, infinite]
    kinds += [1 + normal.abs() * 1e-6, normal * 1e-42, normal.half(), normal.bfloat16(), normal.double()]
    for kind, score in enumerate(kinds):
        for keep in sorted({0, min(1, size), size // 10, size - 1, size}):
            assert agrees([score], keep, magnitude=bool((kind + keep) % 2)), (kind, keep)


@pytest.mark.parametrize("shape", [(34, 65), (24, 37, 3, 3), (7, 66, 5), (200, 12), (3, 3)])
@pytest.mark.parametrize("pattern", ["4x1", "1x4", "2:4", "3:5", "1:700"])
def test_groups_agree(shape, pattern):
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    for i, score in enumerate(layouts(draw(shape, torch.float32, 1, False))):
        scores = [score.to(dtypes[i]), draw((9, 30), torch.float32, 2, True)]
        allowed = [sk.ops.pack_mask(torch.empty_like(score).copy_(draw(shape, torch.float32, 3, False)) > -2)]
        if ":" in pattern:
            assert agrees(scores, None, pattern, bool(i % 2)), i
            assert agrees(scores, None, pattern, bool(i % 2), [*allowed, None]), i
            continue
        a, b = (groups_of(s, pattern) for s in scores)
        for keep in (0, (a + b) // 7, a + b - 1, a + b, [a // 3, b // 2], [0, b]):
            assert agrees(scores, keep, pattern, True), (i, keep)
        assert agrees(scores, a // 2, pattern, False, [*allowed, None]), i


def large(kind):
    """(scores, keep, magnitude, candidates) that the one-pass selection takes on."""
    normal = draw((SAMPLED,), torch.float32, 7, False)
    special = {
        "equal": torch.full((SAMPLED,), 2.0),
        "zeros": normal.sign() * 0,
        "two values": (normal > 1).float(),
        "denormal": normal * 1e-41,
        "same leading bits": 1 + normal.abs() * 1e-5,
        "mostly zero": normal * (draw((SAMPLED,), torch.float32, 8, False) > 1.6),
        "infinite": torch.where(normal > 1, float("inf"), normal),
        "sorted": normal.abs().sort().values,
    }
    if kind in special:
        return [special[kind]], SAMPLED // 10, True, []
    if kind in ("all but zeros", "one zero", "all but one"):
        live = special["mostly zero"]
        return (
            [live],
            int(live.count_nonzero()) + ["all but one", "all but zeros", "one zero"].index(kind) - 1,
            True,
            [],
        )
    if kind in ("capped", "capped and one", "two-sided"):
        capped = normal.clamp(-0.3 if kind == "two-sided" else -9.0, 0.3)
        return [capped], int((capped == capped.max()).sum()) + (kind != "capped"), False, []
    if kind == "one huge, many tiny":
        return [*normal[:900].split(3), normal[900:], normal[:0], normal[:70].double().float()], 40_000, True, []
    if kind == "channels_last ties":
        tied = (draw((64, 350, 3, 3), torch.float32, 9, False) * 64).round()
        return [normal[:4096], *list(layouts(tied))[1:3]], 100_003, True, []
    if kind == "candidates":
        allowed = draw((SAMPLED,), torch.float32, 10, False) > 0
        return [normal], 30_000, True, [sk.ops.pack_mask(allowed)]
    if kind == "too few candidates":
        return [normal], 30_000, True, [sk.ops.pack_mask(normal > 2)]
    dtype, keep, magnitude = {
        "half": (torch.float16, SAMPLED // 3, False),
        "bfloat16": (torch.bfloat16, SAMPLED // 50, True),
        "signed": (torch.float32, SAMPLED - 9, False),
        "few": (torch.float32, 5, True),
        "median": (torch.float32, SAMPLED // 2, True),
    }[kind]
    return [normal.to(dtype)], keep, magnitude, []


KINDS = ["equal", "zeros", "two values", "denormal", "same leading bits", "mostly zero", "infinite", "sorted", "few"]
KINDS += ["one huge, many tiny", "channels_last ties", "candidates", "too few candidates", "half", "bfloat16", "signed"]
KINDS += ["median", "all but zeros", "one zero", "all but one", "capped", "capped and one", "two-sided"]


@functools.cache
def large_expected(kind):
    scores, keep, magnitude, candidates = large(kind)
    return REFERENCE(scores, [keep], True, "unstructured", magnitude, candidates)


EMULATED_KINDS = ["equal", "one huge, many tiny", "channels_last ties", "candidates", "too few candidates", "signed"]
"""Each takes a second there; the others try the CPU's one-pass selection."""


@pytest.mark.parametrize("kind", KINDS)
def test_large_inputs_agree(kind, backend):
    if backend == "emulated-cuda" and kind not in EMULATED_KINDS:
        pytest.skip("too slow emulated")
    scores, keep, magnitude, candidates = large(kind)
    assert agrees(scores, keep, magnitude=magnitude, candidates=candidates, expected=large_expected(kind))


@functools.cache
def large_blocks(pattern):
    rounded = (draw((1024, 2052), torch.float32, 11, False) * 256).bfloat16()
    score = rounded.view(1024, 513, 2, 2).to(memory_format=torch.channels_last)
    keep = groups_of(score, pattern) // 20
    return score, keep, REFERENCE([score], [keep], True, pattern, True, [])


@pytest.mark.parametrize("pattern", ["4x1", "1x4"])
def test_large_blocks_agree(pattern):
    score, keep, expected = large_blocks(pattern)
    assert agrees([score], keep, pattern, expected=expected)


@pytest.mark.parametrize("place", [0, 31_999, SAMPLED - 1])
@pytest.mark.parametrize("value", [float("nan"), -float("nan")])
def test_nan_is_found_anywhere(place, value, backend):
    for size in (SAMPLED, place % 70_000 + 1)[backend == "emulated-cuda" :]:
        score = draw((size,), torch.float32, 7, False)
        score[min(place, size - 1)] = value
        for magnitude in (True, False):
            for keep in (0, size // 9, size):
                assert OP([score], [keep], True, "unstructured", magnitude, [])[1] == 1, (size, keep, magnitude)


def test_every_thread_count_gives_the_same_masks(backend):
    if backend == "emulated-cuda":
        pytest.skip("has no such threads")
    small, threads = draw((300, 500), torch.float32, 0, True), torch.get_num_threads()
    keep = groups_of(small, "1x4") // 3
    expected = REFERENCE([small, small], [keep, keep // 2], False, "1x4", True, [])
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert agrees([small, small], [keep, keep // 2], "1x4", expected=expected)
            for kind in ("bfloat16", "channels_last ties", "two values"):
                test_large_inputs_agree(kind, backend)
    finally:
        torch.set_num_threads(threads)
