"""topk_nested: for each count what topk_mask gives, on every backend."""

import pytest
import torch

import sparsekern as sk


def run(backend, scores, keep, pattern, magnitude=True):
    if backend != "reference":
        return sk.ops.topk_nested(scores, keep, pattern=pattern, magnitude=magnitude)
    masks, _ = sk.ops.topk_nested.reference(scores, keep, pattern, magnitude)
    return [masks[i : i + len(scores)] for i in range(0, len(masks), len(scores))]


def check(backend, scores, keep, pattern, magnitude=True):
    found = run(backend, scores, keep, pattern, magnitude)
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


def test_opcheck():
    scores = [torch.randn(5), torch.randn(2, 3)]
    torch.library.opcheck(torch.ops.sparsekern.topk_nested.default, (scores, [4, 2], "unstructured", True))


def test_bad_input_is_named():
    ones = [torch.ones(4, 3)]
    for scores, keep, options, error, words in [
        ([], [0], {}, ValueError, "must be lists of at least one entry"),
        (ones, [], {}, ValueError, "must be lists of at least one entry"),
        (ones, [4, 13], {}, ValueError, r"keep\[1\]=13: expected 0 to 12"),
        (ones, [1.0], {}, TypeError, r"keep\[0\]=1.0 is a float"),
        (ones, [1], {"pattern": "2:4"}, ValueError, "expected one with a count"),
        ([torch.ones(3).long()], [1], {}, TypeError, r"scores\[0\] has dtype"),
        ([torch.tensor([1.0, float("nan")])], [1, 2], {}, ValueError, "NaN in"),
    ]:
        with pytest.raises(error, match=words):
            sk.ops.topk_nested(scores, keep, **options)
