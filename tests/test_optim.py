"""MaskedSGD against torch.optim.SGD: bits, checkpoints, GradScaler, moved parameters."""

import copy

import pytest
import torch

import sparsekern as sk

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# torch itself rounds without fma below AVX2, so bit-equality with it is promised only from there on.
torch_has_fma = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")


def _torch_fused_updates(dtype):
    w = torch.ones(64, dtype=dtype, requires_grad=True)
    w.grad = torch.ones_like(w)
    torch.optim.SGD([w], lr=0.5, fused=True).step()
    return bool((w == 0.5).all())


def train(make, dtype, steps=5):
    torch.manual_seed(0)
    params = [torch.randn(n, dtype=dtype).requires_grad_() for n in [(3, 5), (17,), (33, 4)]]
    optimizer = make(params)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, dtype=dtype)
        optimizer.step()
        scheduler.step()
    return params, optimizer


@pytest.mark.skipif(not torch_has_fma, reason="torch has no fma on this CPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "hyper",
    [
        dict(lr=0.1),
        dict(lr=0.1, momentum=0.9, weight_decay=0.01),
        dict(lr=0.1, momentum=0.9, dampening=0.5),
        dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, maximize=True),
    ],
    ids=str,
)
def test_optimizer_equals_torch_without_masks(native, dtype, hyper):
    # torch's own low-precision arithmetic is float32 inside only when fused.
    fused = dtype in (torch.bfloat16, torch.float16)
    if fused and not _torch_fused_updates(dtype):
        pytest.skip("torch's own fused SGD leaves long vectors of this dtype alone (pytorch issue 191763)")
    got, ours = train(lambda p: sk.MaskedSGD(p, **hyper), dtype)
    want, theirs = train(lambda p: torch.optim.SGD(p, **hyper, fused=fused), dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert ours.state_dict()["param_groups"][0]["lr"] == theirs.state_dict()["param_groups"][0]["lr"]
    again = torch.optim.SGD(got, **hyper)
    again.load_state_dict(ours.state_dict())


def test_optimizer_keeps_pruned_weights_zero_and_resumes():
    w = torch.randn(50, 7).requires_grad_()
    keep = torch.rand(50, 7) < 0.2
    optimizer = sk.MaskedSGD([w], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, masks={w: keep})
    for _ in range(3):
        optimizer.zero_grad()
        loss = optimizer.step(lambda: (w.square().sum().backward(), 1.5)[1])
    assert loss == 1.5
    buffer = optimizer.state[w]["momentum_buffer"]
    assert not w[~keep].any() and not buffer[~keep].any() and w[keep].all()
    clone = w.detach().clone().requires_grad_()
    resumed = sk.MaskedSGD([clone], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, masks={clone: keep})
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, o in ((w, optimizer), (clone, resumed)):
        p.grad = torch.ones_like(p)
        o.step()
    torch.testing.assert_close(clone, w, rtol=0, atol=0)


@pytest.mark.parametrize("overflow_at", [0, 1])
def test_grad_scaler_skips_and_first_real_step_is_fresh(overflow_at):
    def run(make):
        w = torch.ones(20).requires_grad_()
        optimizer, scaler = make(w), torch.amp.GradScaler("cpu", init_scale=8.0)
        for i in range(4):
            optimizer.zero_grad()
            scaler.scale((w * (float("inf") if i == overflow_at else 2.0)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return w.detach()

    hyper = dict(lr=0.1, momentum=0.9, dampening=0.5)
    got, want = run(lambda w: sk.MaskedSGD([w], **hyper)), run(lambda w: torch.optim.SGD([w], **hyper))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_optimizer_refuses_bad_arguments():
    w = torch.ones(4).requires_grad_()
    with pytest.raises(ValueError, match="lr must be at least 0, got -1"):
        sk.MaskedSGD([w], lr=-1)
    with pytest.raises(ValueError, match="differentiable must be False"):
        sk.MaskedSGD([w], differentiable=True)
    with pytest.raises(ValueError, match=r"must be bool of shape \(4,\)"):
        sk.MaskedSGD([w], masks={w: torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="is no parameter of this optimizer"):
        sk.MaskedSGD([w], masks={torch.ones(4): torch.ones(4, dtype=torch.bool)})
    w.grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="is sparse"):
        sk.MaskedSGD([w]).step()


HYPER = dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01)


def overflowing(make, overflows, steps=6, checkpoint_at=None, other=None):
    """Weights after steps of which some overflow; at `checkpoint_at` the state moves into a fresh `other`."""
    torch.manual_seed(0)
    w = torch.randn(20).requires_grad_()
    optimizer, scaler = make([w]), torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(steps):
        if i == checkpoint_at:
            state = copy.deepcopy(optimizer.state_dict())
            assert all(set(s) == {"momentum_buffer"} for s in state["state"].values())
            w = w.detach().clone().requires_grad_()
            optimizer = (other or make)([w])
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        scaler.scale((w * (float("inf") if i in overflows else w)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    return w.detach()


@pytest.mark.skipif(not torch_has_fma, reason="torch has no fma on this CPU")
@pytest.mark.parametrize("overflows", [(0,), (0, 1, 2), (1,), (4, 5), ()])
@pytest.mark.parametrize("checkpoint_at", [None, 1, 3])
@pytest.mark.parametrize("way", ["to ours", "to torch", "from torch"])
def test_overflow_and_checkpoints_equal_torch(overflows, checkpoint_at, way):
    def ours(p):
        return sk.MaskedSGD(p, **HYPER)

    def torch_sgd(p):
        return torch.optim.SGD(p, **HYPER)

    make, other = {"to ours": (ours, ours), "to torch": (ours, torch_sgd), "from torch": (torch_sgd, ours)}[way]
    want = overflowing(torch_sgd, overflows)
    # Not bit for bit: torch multiplies by 1 / scale before the step where we divide in it; 8 is a power of two.
    torch.testing.assert_close(overflowing(make, overflows, 6, checkpoint_at, other), want, rtol=0, atol=0)


def test_parameters_without_gradients_come_and_go():
    def run(make):
        torch.manual_seed(0)
        params = [torch.randn(n).requires_grad_() for n in (5, 3)] + [torch.tensor(2.0, requires_grad=True)]
        optimizer = make([{"params": params[:2]}, {"params": params[2:], "momentum": 0.0}])
        for i in range(8):
            for j, p in enumerate(params):
                p.grad = torch.randn(p.shape) if (i >> j) & 1 else None
            if i == 5:
                extra = torch.ones(4, requires_grad=True)
                optimizer.add_param_group({"params": [extra], "lr": torch.tensor(0.5)})
                params.append(extra)
            if i == 6:
                optimizer.param_groups[1]["momentum"] = 0.5
            optimizer.step()
        return params, optimizer.state_dict()["state"]

    got, want = run(lambda p: sk.MaskedSGD(p, **HYPER)), run(lambda p: torch.optim.SGD(p, **HYPER))
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(
        [s["momentum_buffer"] for s in got[1].values()],
        [s["momentum_buffer"] for s in want[1].values() if s.get("momentum_buffer") is not None],
    )


@pytest.mark.parametrize("reset", ["clear", "delete", "replace", "zero"])
def test_state_may_be_reset_from_outside(reset):
    w = torch.ones(4).requires_grad_()
    optimizer = sk.MaskedSGD([w], **HYPER)
    for i in range(3):
        w.grad = torch.ones(4)
        if i == 2:
            {"clear": optimizer.state.clear, "delete": lambda: optimizer.state.pop(w),
             "replace": lambda: setattr(optimizer, "state", type(optimizer.state)(dict)),
             "zero": optimizer.state[w]["momentum_buffer"].zero_}[reset]()  # fmt: skip
            before = w.detach().clone()
        optimizer.step()
    gain = 0.5 if reset == "zero" else 1.0  # dampening, unless this is a first step
    torch.testing.assert_close(w.detach(), before - 0.1 * gain * (1 + 0.01 * before))


def test_moved_cast_and_relaid_parameters_keep_momentum_and_masks():
    def run(change):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(6, 5, 3)
        keep = torch.rand(5, 6, 3, 3) < 0.3
        optimizer = sk.MaskedSGD(conv.parameters(), lr=0.1, momentum=0.9, masks={conv.weight: keep})
        for i in range(6):
            if i == 3:
                change(conv)
            conv.weight.grad = torch.full_like(conv.weight, i + 1)
            optimizer.step()
            off = ~keep
            assert not conv.weight[off].any() and not optimizer.state[conv.weight]["momentum_buffer"][off].any()
            assert conv.weight[keep].all()
        assert optimizer.state[conv.weight]["momentum_buffer"].stride() == conv.weight.stride()
        return conv.weight.detach().double().contiguous()

    want = run(lambda m: None)
    torch.testing.assert_close(run(lambda m: m.to(memory_format=torch.channels_last)), want, rtol=0, atol=0)
    torch.testing.assert_close(run(lambda m: m.double()), want, rtol=1e-5, atol=1e-5)


def test_parameters_with_holes():
    base = torch.ones(6, 8)
    w = base[:, ::2].requires_grad_()
    keep = torch.rand(6, 4) < 0.5
    optimizer = sk.MaskedSGD([w], lr=0.5, momentum=0.9, masks={w: keep})
    for _ in range(2):
        w.grad = torch.ones(6, 4)
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.where(keep, 1 - 0.5 * 2.9, 0.0))
    assert base[:, 1::2].eq(1).all()


def test_bad_momentum_in_a_checkpoint_is_named():
    w = torch.ones(4).requires_grad_()
    optimizer = sk.MaskedSGD([w], lr=0.1, momentum=0.9)
    optimizer.state[w]["momentum_buffer"] = torch.ones(1)
    w.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"momentum_buffer of a parameter of shape \(4,\) must have that shape"):
        optimizer.step()
    assert w.eq(1).all()
