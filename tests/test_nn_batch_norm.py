"""sk.nn.accelerate puts batch-norms, and what follows them, on the compiled kernel, and nobody can tell."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn import normalisation

needs_kernels = pytest.mark.skipif(bool(sk.degradation), reason="nothing is compiled")


@pytest.fixture(autouse=True)
def no_input_is_small(monkeypatch):
    monkeypatch.setattr(normalisation, "_LEAST", 0)


def sequence(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, **options), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, **options), nn.AvgPool2d(2), nn.BatchNorm2d(8, **options), nn.ReLU(), nn.Conv2d(8, 4, 1),
    )  # fmt: skip


def blocks(**options):
    """Both blocks of torchvision, with and without a branch of their own for the residual."""
    resnet = pytest.importorskip("torchvision.models.resnet")
    torch.manual_seed(0)

    def norm(channels):
        return nn.BatchNorm2d(channels, **options)

    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), norm(16))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), resnet.BasicBlock(8, 8, norm_layer=norm),
        resnet.BasicBlock(8, 16, 2, down, norm_layer=norm), resnet.Bottleneck(16, 4, norm_layer=norm),
        nn.Conv2d(16, 4, 1),
    )  # fmt: skip


def whole(**options):
    """torchvision's ResNet, short."""
    resnet = pytest.importorskip("torchvision.models.resnet")
    torch.manual_seed(0)
    if options.get("affine") is False:
        pytest.skip("torchvision initialises the weights of batch-norms")
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], 4, norm_layer=partial(nn.BatchNorm2d, **options))


NETWORKS = {"sequence": sequence, "blocks": blocks, "whole": whole}
COUNTS = {"sequence": (3, 2, 0), "blocks": (8, 7, 3), "whole": (12, 9, 4)}
"""Batch-norms, and how many of them a ReLU follows, and a residual."""


def accelerate(model):
    """Batch-norms only: the masks keep every weight."""
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return sk.nn.accelerate(model, sk.MaskSet(weights))


def train(model, steps=4):
    """Outputs, the last gradients and statistics of a few steps of SGD."""
    size = 12 if isinstance(model, nn.Sequential) else 64
    optimizer, outputs = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for step in range(steps):
        x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(step))
        y = model(x)
        optimizer.zero_grad()
        y.square().mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


def ran(model):
    return [how for _, how in sk.nn.acceleration_report(model).norms]


@needs_kernels
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 1.0}, {"affine": False}, {"track_running_stats": False, "eps": 0.1}],
    ids=str,
)
def test_training_stays_the_same(network, options):
    plain, fast = NETWORKS[network](**options), accelerate(NETWORKS[network](**options))
    # Rounding grows with depth: where a batch has 16 pixels, gradients are large.
    steps, loose = (1, dict(rtol=2e-2, atol=2e-2)) if network == "whole" else (4, dict(rtol=1e-4, atol=1e-5))
    torch.testing.assert_close(train(fast, steps), train(plain, steps), **loose)
    norms, fused, residuals = COUNTS[network]
    assert all(how.startswith("compiled") for how in ran(fast)) and len(ran(fast)) == norms
    assert sum("ReLU" in how for how in ran(fast)) == fused
    assert sum("residual" in how for how in ran(fast)) == residuals
    assert f"{norms} of {norms} batch-norms ran on the compiled kernel, {fused} with a ReLU" in str(
        sk.nn.acceleration_report(fast)
    )
    x = torch.randn(4, 3, 64, 64) if network == "whole" else torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), **loose)
    torch.testing.assert_close(fast.eval()(x), plain.eval()(x), **loose)
    assert set(ran(fast)) == {"torch: evaluation"}


@pytest.mark.parametrize("network", NETWORKS)
def test_restore_and_copies_are_plain(network):
    model = NETWORKS[network]()
    before = {n: (id(m), type(m)) for n, m in model.named_modules()}
    part = list(model.children())[1]
    text, keys, state = repr(model), list(model.state_dict()), set(vars(part))
    accelerate(accelerate(model))
    assert repr(model) == text and list(model.state_dict()) == keys and len(ran(model)) == COUNTS[network][0]
    train(model, 1)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert type(again) is before[""][1]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {n: type(m) for n, m in again.named_modules()} == {n: t for n, (_, t) in before.items()}
        assert not any("sparsekern" in key for m in again.modules() for key in vars(m)) and ran(again) == []
    sk.nn.restore(model)
    assert {n: (id(m), type(m)) for n, m in model.named_modules()} == before and set(vars(part)) == state


def watched(model, network, kind):
    """What a hook sees of the first batch-norm, or of the ReLU behind it."""
    seen = []
    norm, relu = (model[1], model[2]) if network == "sequence" else (model[1].bn1, model[1].relu)
    if kind == "norm":
        norm.register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
    elif kind == "relu":
        relu.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach().clone()))
    elif kind == "replaced":
        norm.register_forward_hook(lambda m, a, y: y * 2)
    elif kind == "forward":
        right = norm.forward
        norm.forward = lambda x: (seen.append(x.detach().clone()), right(x))[1]
    else:
        norm.register_full_backward_hook(lambda m, a, g: seen.append(g[0].clone()))
    return seen


@needs_kernels
@pytest.mark.parametrize("network", ["sequence", "blocks"])
@pytest.mark.parametrize("kind", ["norm", "relu", "replaced", "forward", "backward"])
def test_hooks_see_what_they_saw(network, kind):
    plain, fast = NETWORKS[network](), accelerate(NETWORKS[network]())
    for model in (plain, fast):
        # The in-place ReLU of torchvision is not for backward hooks.
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    seen = [watched(model, network, kind) for model in (plain, fast)]
    results = [train(model, 2) for model in (plain, fast)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    assert len(seen[0]) == {"norm": 2, "relu": 2 if network == "sequence" else 4, "replaced": 0}.get(kind, 2)
    assert ran(fast)[0] == "compiled"


@needs_kernels
def test_global_hooks_see_every_module():
    model, seen = accelerate(sequence()), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m).__name__))
    try:
        train(model, 1)
    finally:
        handle.remove()
    assert seen.count("BatchNorm2d") == 3 and seen.count("ReLU") == 2
    train(model, 1)
    assert sum("ReLU" in how for how in ran(model)) == 2


@needs_kernels
def test_hooks_on_convolutions_of_blocks_are_called():
    model, seen = accelerate(blocks()), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda m, a: seen.append(m))
    train(model, 1)
    assert len(seen) == len(set(seen)) == 10


class Scaled(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def test_other_classes_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), Scaled(8), nn.ReLU(), nn.SyncBatchNorm(8), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.LazyBatchNorm2d(), nn.ReLU(),
    )  # fmt: skip
    before = [type(m) for m in model]
    accelerate(model)
    assert [type(m) for m in model][1:5] == before[1:5] and type(model[7]) is nn.LazyBatchNorm2d
    assert type(model) is nn.Sequential, "no pair in it"
    part = nn.Sequential(nn.Conv2d(3, 8, 3), Scaled(8), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU())
    plain = copy.deepcopy(part)
    torch.testing.assert_close(train(accelerate(part)), train(plain), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_small_inputs_stay_on_torch(monkeypatch):
    monkeypatch.setattr(normalisation, "_LEAST", 4 * 8 * 12 * 12)
    model = accelerate(sequence())
    model(torch.randn(4, 3, 12, 12))
    assert ran(model) == ["compiled + ReLU", "torch: input is small", "torch: input is small"]


@pytest.mark.parametrize("case", ["channels_last", "float64", "bfloat16", "autocast", "strided", "meta"])
def test_what_the_kernel_does_not_take_runs_as_before(case):
    plain, fast, x = sequence(), accelerate(sequence()), torch.randn(2, 3, 12, 12)
    if case == "channels_last":
        plain, fast, x = (t.to(memory_format=torch.channels_last) for t in (plain, fast, x))
    elif case in ("float64", "bfloat16"):
        plain, fast, x = (t.to(getattr(torch, case)) for t in (plain, fast, x))
    elif case == "strided":
        plain, fast, x = plain[1:3], fast[1:3], torch.randn(2, 12, 8, 12).transpose(1, 2)
    elif case == "meta":
        plain, fast, x = (t.to("meta") for t in (plain, fast, x))
    with torch.autocast("cpu", enabled=case == "autocast"):
        got, want = fast(x), plain(x)
    assert got.dtype == want.dtype and got.stride() == want.stride() and got.device == want.device
    if case != "meta":
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(dict(fast.named_buffers()), dict(plain.named_buffers()))
    assert all(how.startswith("torch: ") for how in ran(fast)) and len(ran(fast)) == (1 if case == "strided" else 3)


def test_compiled_model_has_no_graph_break():
    model, x = accelerate(blocks()), torch.randn(2, 3, 12, 12)
    want = sk.nn.restore(copy.deepcopy(model))(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), want)


def test_transforms_of_torch_func():
    # torch refuses to update statistics there.
    plain, fast = (make(sequence(track_running_stats=False)) for make in (nn.Module.train, accelerate))
    x = torch.randn(2, 3, 12, 12)

    def gradient(model):
        values = dict(model.named_parameters())
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().mean())(values)

    torch.testing.assert_close(gradient(fast), gradient(plain), rtol=1e-4, atol=1e-5)
    tangent = torch.randn_like(x)
    slopes = [torch.func.jvp(model.__call__, (x,), (tangent,))[1] for model in (fast, plain)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = fast(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, slopes[1], rtol=1e-4, atol=1e-5)


@needs_kernels
def test_a_gradient_of_gradients():
    found = []
    for model in (sequence(), accelerate(sequence())):
        x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_errors_and_modules_made_of_accelerated_ones():
    model = accelerate(sequence())
    for part in (model, sk.nn.restore(copy.deepcopy(model))):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            part[1](torch.ones(1, 8, 1, 1))
        with pytest.raises(ValueError, match="expected 4D input"):
            part[1](torch.ones(8, 2, 2))
        with pytest.raises(RuntimeError, match="running_mean should contain 4 elements"):
            part[1](torch.ones(2, 4, 2, 2))
    made, x = type(model[1])(8), torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(made(x), nn.BatchNorm2d(8)(x))
    assert type(sk.nn.restore(nn.Sequential(made))[0]) is nn.BatchNorm2d
    part = model[:3]
    y = part(torch.randn(2, 3, 12, 12))
    assert y.min() == 0 and type(sk.nn.restore(part)) is nn.Sequential
