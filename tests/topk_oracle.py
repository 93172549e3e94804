"""A brute-force topk_mask in pure Python that shares no code with the package, and scores to try it on."""

from __future__ import annotations

import itertools
import math
import struct

import torch

import sparsekern as sk

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(4, 4), (8, 8, 3, 3), (5, 7, 2, 3), (3, 6), (2, 1, 3, 3), (1, 9), (6, 5, 4)]


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
    """Boolean masks from sorting everything."""
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
    """How many groups `keep` counts."""
    count = score.numel()
    if pattern in ("4x1", "1x4"):
        axis = 0 if pattern == "4x1" else 1
        count = math.prod(-(-size // 4) if dim == axis else size for dim, size in enumerate(score.shape))
    return count


def layouts(score):
    """The same values in other memory formats: the first three dense, the last not."""
    yield score
    yield score.permute(*range(1, score.dim()), 0).contiguous().permute(score.dim() - 1, *range(score.dim() - 1))
    if score.dim() == 4:
        yield score.to(memory_format=torch.channels_last)
    yield torch.stack([score, score + 9], -1)[..., 0]
