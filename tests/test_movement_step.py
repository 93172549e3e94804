"""movement_step_ against float64, on every backend."""

import copy
import math

import pytest
import torch

import sparsekern as sk

SIZES = [0, 1, 7, 16, 33, 1000, (1 << 15) + 5]
CALL = dict(lr=0.3, penalties=[0.0] * len(SIZES))


def run(backend, *args, **options):
    (sk.ops.movement_step_.reference if backend == "reference" else sk.ops.movement_step_)(*args, **options)


def problem(dtype=torch.float32, sizes=SIZES):
    g = torch.Generator().manual_seed(0)
    scores = [3 * torch.randn(n, generator=g) for n in sizes]
    grads, weights = ([torch.randn(n, generator=g).to(dtype) for n in sizes] for _ in range(2))
    masks = [sk.ops.pack_mask(torch.rand(n, generator=g) < 0.4) for n in sizes]
    masks[-2] = None
    return scores, grads, weights, masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("penalty", [0.0, 2.5])
def test_step(backend, dtype, scale, penalty):
    scores, grads, weights, masks = problem(dtype)
    before = copy.deepcopy((scores, grads))
    scaler = {} if scale is None else {"grad_scale": torch.tensor(scale), "found_inf": torch.zeros(())}
    run(backend, scores, grads, weights, masks, lr=0.3, penalties=[penalty] * len(SIZES), **scaler)
    for i, (score, grad) in enumerate(zip(*before, strict=True)):
        gate = score.double().sigmoid()
        of_score = grad.double() * weights[i].double() / (scale or 1) + penalty * gate * (1 - gate)
        torch.testing.assert_close(scores[i].double(), score.double() - 0.3 * of_score, rtol=1e-6, atol=1e-6)
        keep = torch.ones_like(grad, dtype=torch.bool) if masks[i] is None else sk.ops.unpack_mask(masks[i], grad)
        assert torch.equal(grads[i], torch.where(keep, grad, 0))


@pytest.mark.parametrize("penalty", [0.0, 2.5])
def test_compiled_backends_agree_bit_for_bit(native, penalty):
    """With SGD's own rounding where nothing is penalised; the reference has another exponential."""
    got = problem()
    run(native, *got, lr=0.3, penalties=[penalty] * len(SIZES))
    want = problem()
    if penalty:
        before = torch.ops.sparsekern.cpu_isa()
        torch.ops.sparsekern.set_cpu_isa("scalar")
        try:
            run("native", *want, lr=0.3, penalties=[penalty] * len(SIZES))
        finally:
            torch.ops.sparsekern.set_cpu_isa(before)
    else:
        parameters = [s.requires_grad_() for s in want[0]]
        for s, grad, weight in zip(parameters, *want[1:3], strict=True):
            s.grad = grad * weight
        sk.MaskedSGD(parameters, lr=0.3).step()
    torch.testing.assert_close(got[0], [s.detach() for s in want[0]], rtol=0, atol=0)


def test_slope_of_the_sigmoid_everywhere(backend):
    score = torch.cat([torch.linspace(-120, 120, 48_001), torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30])])
    want, zero = score.double().sigmoid() * (-score.double()).sigmoid(), torch.zeros_like(score)
    moved = score.clone()
    # So large a penalty that the score itself does not show.
    run(backend, [moved], [zero.clone()], [zero], [None], lr=-1.0, penalties=[2.0**120])
    near = score.abs() < 60
    torch.testing.assert_close(moved[near].double(), 2.0**120 * want[near], rtol=1e-6, atol=0)
    far = score.abs() > 90
    torch.testing.assert_close(moved[far], score[far], rtol=1e-3, atol=0)


def test_a_skipped_step_changes_nothing_and_what_is_written_is_noticed(backend):
    args = problem()
    before, versions = copy.deepcopy(args), [t._version for t in (*args[0], *args[1])]
    run(backend, *args, found_inf=torch.ones(()), **CALL)
    torch.testing.assert_close(args[:2], before[:2], rtol=0, atol=0)
    sk.ops.movement_step_(*args, **CALL)
    assert all(t._version > v for t, v in zip((*args[0], *args[1]), versions, strict=True))


def test_pruned_nan_gradients_are_selected_away_and_any_layout(backend):
    g = torch.Generator().manual_seed(1)
    score, grad, weight = (torch.randn(6, 5, 3, 3, generator=g) for _ in range(3))
    keep = torch.rand(score.shape, generator=g) < 0.5
    want = [score - 0.5 * grad * weight, torch.where(keep, grad, 0)]
    for layout in (lambda t: t.to(memory_format=torch.channels_last), lambda t: t.repeat(1, 2, 1, 1)[:, ::2]):
        s = layout(score.clone())
        s.copy_(score)
        mask = sk.ops.pack_mask(torch.empty_like(s, dtype=torch.bool).copy_(keep))
        d = grad.clone()
        sk.ops.movement_step_([s], [d], [weight], [mask], lr=0.5, penalties=[0.0])
        torch.testing.assert_close([s, d], want)
    d = torch.where(keep, grad, math.nan)
    run(backend, [score], [d], [weight], [sk.ops.pack_mask(keep)], lr=0.5, penalties=[0.0])
    assert torch.equal(d, want[1]) and score[~keep].isnan().all()


def test_opcheck():
    args = problem(sizes=[3, 17])
    torch.library.opcheck(torch.ops.sparsekern.movement_step_.default, args, dict(lr=0.1, penalties=[0.0, 1.0]))


def test_bad_input_is_named():
    good = dict(scores=[torch.zeros(9)], grads=[torch.ones(9)], weights=[torch.ones(9)], masks=[None], lr=0.1,
                penalties=[0.0])  # fmt: skip
    for change, words in [
        ({"grads": []}, "grads must have one entry for each of the 1 scores, got 0"),
        ({"penalties": []}, "penalties must have one entry"),
        ({"scores": [torch.zeros(9).double()]}, r"scores\[0\] must be one of"),
        ({"weights": [torch.ones(9).double()]}, r"weights\[0\] must be one of"),
        ({"grads": [torch.ones(9).half()]}, r"grads\[0\] must be one of"),
        ({"weights": [torch.ones(8)]}, r"weights\[0\] must be dense, of shape \(9,\)"),
        ({"masks": [torch.zeros(1, dtype=torch.uint8)]}, r"masks\[0\] must be contiguous uint8"),
        ({"grad_scale": torch.ones(2)}, "grad_scale must be one"),
    ]:
        with pytest.raises((ValueError, TypeError), match=words):
            sk.ops.movement_step_(**{**good, **change})
        assert not good["scores"][0].any() and good["grads"][0].all()
