"""topk_nested: for each count what topk_mask gives, on every backend."""

import pytest
import torch

import sparsekern as sk


def run(backend, scores, keep, pattern, magnitude=True, hint=None):
    if backend != "reference":
        return sk.ops.topk_nested(scores, keep, pattern=pattern, magnitude=magnitude, hint=hint)
    masks, _, _ = sk.ops.topk_nested.reference(scores, keep, pattern, magnitude)
    return [masks[i : i + len(scores)] for i in range(0, len(masks), len(scores))]


def check(backend, scores, keep, pattern, magnitude=True, hint=None):
    found = run(backend, scores, keep, pattern, magnitude, hint)
    assert len(found) == len(keep)
    for masks, count in zip(found, keep, strict=True):
        want = sk.ops.topk_mask.reference(scores, [count], True, pattern, magnitude, [])[0]
        torch.testing.assert_close(masks, want, rtol=0, atol=0)


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("pattern", ["unstructured", "4x1", "1x4"])
def test_every_choice_is_that_of_topk_mask(backend, pattern, magnitude):
    g = torch.Generator().manual_seed(0)
    scores = [
        torch.randn(9, 7, 3, generator=g).mul(4).round(),  # with ties
        torch.randn(6, 10, generator=g)[:, ::2].bfloat16(),
        torch.randn(8, 5, 2, 2, generator=g).to(memory_format=torch.channels_last),
    ]
    for keep in ([0, 1], [20, 70], [70, 20, 20], [3]):
        check(backend, scores, keep, pattern, magnitude)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keep", [[0.05, 0.1], [0.5, 0.0], [0.999, 0.2, 1.0]], ids=str)
def test_many(backend, keep, tied):
    """So many that samples bracket the thresholds; tied: half of them share one value."""
    if backend == "emulated-cuda":
        pytest.skip("takes minutes, and is one topk_mask after the other")
    g = torch.Generator().manual_seed(1)
    scores = [torch.randn(300, 500, generator=g), torch.randn(400, 510, generator=g).t(), -torch.rand(7, generator=g)]
    if tied:
        scores[1][::2] = 0.5
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check(backend, scores, [round(k * 354_007) for k in keep], "unstructured")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("magnitude", [True, False])
def test_a_hint_changes_no_result_and_follows_the_thresholds(native, magnitude):
    if native == "emulated-cuda":
        pytest.skip("has no use for a hint")
    g = torch.Generator().manual_seed(2)
    scores, keep = [torch.randn(200, 700, generator=g), torch.randn(90, 100, generator=g)], [7_000, 60_000]
    noise = torch.randn(scores[0].shape, generator=g)
    hint = torch.zeros(2, 2, dtype=torch.int64)
    steps = {"first": (1, 0), "same": (1, 0), "little": (1, 1e-6), "far": (1e3, 0), "back": (1e-3, 1e-6)}
    for step, (factor, change) in steps.items():
        before, scores[0] = hint.clone(), scores[0] * factor + change * noise
        check(native, scores, keep, "unstructured", magnitude, hint)
        sizes = torch.cat([s.flatten() for s in scores])
        best = (sizes.abs() if magnitude else sizes).sort(descending=True).values[[k - 1 for k in keep]]
        bits = best.view(torch.int32).long()
        # Keys order as the numbers do; both of these are positive.
        assert torch.equal(hint[:, 0], bits + 1 if magnitude else bits + 2**31), step
        if step == "same":  # found where it was looked for, which is done less far away next time
            assert torch.equal(hint[:, 1], before[:, 1] // 4 * 3) and hint.all()
        if step == "far":  # so many are not sampled, and nobody knows how many lie there
            assert hint[1, 1] == 4 * (hint - before)[1, 0].abs()
    check(native, scores, [0, 149_000], "unstructured", magnitude, hint)


@pytest.mark.parametrize(
    "hint", [[1, 1], [-5, 7], [2**62, 2**62], [2**31, 2**62], [1, 2**63 - 1], [0xFFFFFFFE, 9], [2**31, -1]], ids=str
)
def test_any_numbers_are_a_valid_hint(native, hint):
    if native == "emulated-cuda":
        pytest.skip("has no use for a hint")
    scores = [torch.randn(300, 500, generator=torch.Generator().manual_seed(3))]
    given = torch.tensor([hint, hint])
    for pattern in ("unstructured", "1x4"):
        check(native, scores, [3_000, 20_000], pattern, hint=given.clone())
    scores[0][::2] = 1.5  # ties at the threshold
    given[1] = torch.tensor([torch.tensor(1.5).view(torch.int32).item() + 1, 1])
    check(native, scores, [3_000, 80_000], "unstructured", hint=given)
    scores[0][3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN in"):
        sk.ops.topk_nested(scores, [3_000, 80_000], hint=given)


def test_opcheck():
    scores, hint = [torch.randn(5), torch.randn(2, 3)], torch.zeros(2, 2, dtype=torch.int64)
    for more in ((), (hint,)):
        torch.library.opcheck(torch.ops.sparsekern.topk_nested.default, (scores, [4, 2], "unstructured", True, *more))


def test_bad_input_is_named():
    ones = [torch.ones(4, 3)]
    for scores, keep, options, error, words in [
        ([], [0], {}, ValueError, "must be lists of at least one entry"),
        (ones, [], {}, ValueError, "must be lists of at least one entry"),
        (ones, [4, 13], {}, ValueError, r"keep\[1\]=13: expected 0 to 12"),
        (ones, [1.0], {}, TypeError, r"keep\[0\]=1.0 is a float"),
        (ones, [1], {"hint": torch.zeros(2, 2).long()}, ValueError, r"hint must be None or .* of shape \(1, 2\)"),
        (ones, [1], {"hint": torch.zeros(1, 2)}, ValueError, "hint must be None or contiguous torch.int64"),
        (ones, [1], {"pattern": "2:4"}, ValueError, "expected one with a count"),
        ([torch.ones(3).long()], [1], {}, TypeError, r"scores\[0\] has dtype"),
        ([torch.tensor([1.0, float("nan")])], [1, 2], {}, ValueError, "NaN in"),
    ]:
        with pytest.raises(error, match=words):
            sk.ops.topk_nested(scores, keep, **options)
