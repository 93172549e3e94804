"""What the kernels gain on this machine: each hot path of a trained sparse network against its baselines.

Slower results are returned like faster ones. Nothing given is changed: optimizers and training steps run on copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsekern as sk
from sparsekern.measure import Timing, interleaved

RESNET50_WEIGHTS = 25_502_912
"""Prunable weights of a ResNet-50: a size at which memory, not Python, decides."""
_HYPER = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}


def measure(
    model: nn.Module, masks: sk.MaskSet, x: Tensor, y: Tensor, pattern: str, rounds: int = 9
) -> list[dict[str, Any]]:
    """Rows {"what", "case", "baseline", "ours_ms", "ours_iqr_ms", "baseline_ms", "baseline_iqr_ms", "speedup"}.

    `model` is pruned to `masks` by `pattern`; `x` and `y` are one training batch. Large cases get fewer rounds.
    """
    weights = [masks.parameter(name).detach() for name in masks]
    keeps = [masks.bool(name) for name in masks]
    total = sum(w.numel() for w in weights)
    large = torch.randn(RESNET50_WEIGHTS, device=x.device)
    kept = torch.rand(RESNET50_WEIGHTS, device=x.device) < masks.density()
    network, resnet = f"this network, {total:,} weights", f"one tensor, {RESNET50_WEIGHTS:,} weights"
    return [
        *_optimizer_rows(network, weights, keeps, rounds),
        *_optimizer_rows(resnet, [large], [kept], max(rounds // 2, 2)),
        *_selection_rows(network, weights, masks.density(), rounds),
        *_selection_rows(resnet, [large], masks.density(), max(rounds // 3, 2)),
        *_layer_rows(model, masks, x, pattern, rounds),
        *_step_rows(model, masks, x, y, rounds),
    ]


def _row(what: str, case: str, ours: Timing, baseline: str, theirs: Timing) -> dict[str, Any]:
    return {
        "what": what, "case": case, "baseline": baseline,
        "ours_ms": ours.median * 1e3, "ours_iqr_ms": ours.iqr * 1e3,
        "baseline_ms": theirs.median * 1e3, "baseline_iqr_ms": theirs.iqr * 1e3,
        "speedup": theirs.median / ours.median,
    }  # fmt: skip


def _rows(what: str, case: str, contenders: dict[str, Callable[[], object]], **options: Any) -> list[dict[str, Any]]:
    """The first contender is ours, the others are its baselines."""
    found = interleaved(contenders, **options)
    ours, *others = found
    return [_row(what, case, found[ours], name, found[name]) for name in others]


def _optimizer_rows(case: str, weights: list[Tensor], keeps: list[Tensor], rounds: int) -> list[dict[str, Any]]:
    def parameters() -> list[Tensor]:
        chosen = [torch.where(keep, w, 0).requires_grad_() for w, keep in zip(weights, keeps, strict=True)]
        for w in chosen:
            w.grad = torch.ones_like(w)
        return chosen

    ours, fused, plain = parameters(), parameters(), parameters()
    masked = sk.MaskedSGD(ours, **_HYPER, masks=dict(zip(ours, keeps, strict=True)))

    def with_multiply(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> Callable[[], None]:
        factors = [keep.to(w.dtype) for keep, w in zip(keeps, params, strict=True)]

        def step() -> None:
            optimizer.step()
            with torch.no_grad():
                torch._foreach_mul_(params, factors)

        return step

    contenders = {
        "MaskedSGD": masked.step,
        "torch.optim.SGD(fused=True) + mask multiply": with_multiply(
            torch.optim.SGD(fused, **_HYPER, fused=True), fused
        ),
        "torch.optim.SGD + mask multiply": with_multiply(torch.optim.SGD(plain, **_HYPER), plain),
    }
    return _rows("optimizer step", case, contenders, rounds=rounds, device=weights[0].device)


def _selection_rows(case: str, weights: list[Tensor], density: float, rounds: int) -> list[dict[str, Any]]:
    total = sum(w.numel() for w in weights)
    keep = round(total * density)

    def scores() -> Tensor:
        return torch.cat([w.flatten() for w in weights]).abs_()

    def topk() -> Tensor:
        found = scores()
        return torch.zeros_like(found, dtype=torch.bool).index_fill_(0, found.topk(keep, sorted=False).indices, True)

    contenders: dict[str, Callable[[], object]] = {"topk_mask": lambda: sk.ops.topk_mask(weights, keep)}
    try:
        import numpy
    except ModuleNotFoundError:
        pass
    else:

        def partition() -> Any:
            found = scores().cpu().numpy()
            return found >= numpy.partition(found, total - keep)[total - keep]

        contenders["np.partition, compare"] = partition
    contenders["torch.topk, scatter"] = topk
    return _rows("mask selection", case, contenders, rounds=rounds, device=weights[0].device)


@torch.no_grad()
def _layer_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each convolution sees when `model`, in training mode, is given `x`; the model is not changed."""
    seen: dict[str, Tensor] = {}
    twin = copy.deepcopy(model).train()
    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, args, __, name=name: seen.__setitem__(name, args[0].detach()))
    twin(x)
    return seen


def _layer_rows(model: nn.Module, masks: sk.MaskSet, x: Tensor, pattern: str, rounds: int) -> list[dict[str, Any]]:
    rows = []
    prunable = {name.removesuffix(".weight") for name in masks}
    modules = dict(model.named_modules())
    for name, seen in _layer_inputs(model, x).items():
        layer = modules[name]
        if name not in prunable:
            continue
        where = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
        weight = layer.weight.detach()
        keep = masks.bool(f"{name}.weight")
        structure = sk.ops.sparse_structure(keep, pattern, groups=layer.groups)
        zeros = 1 - float(keep.float().mean())
        case = f"{name} {'x'.join(map(str, weight.shape))}, {zeros:.1%} zero"
        for what, gradients in (("convolution forward", False), ("convolution forward + backward", True)):
            data = seen.clone().requires_grad_(gradients)
            w = weight.clone().requires_grad_(gradients)
            contenders = {
                "sparse_conv2d": _pass(lambda a, b, s=structure, k=where: sk.ops.sparse_conv2d(a, b, s, **k), data, w),
                "torch conv2d (dense)": _pass(lambda a, b, k=where: functional.conv2d(a, b, **k), data, w),
            }
            rows += _rows(what, case, contenders, rounds=rounds, device=x.device)
    return rows


def _pass(operator: Callable[[Tensor, Tensor], Tensor], data: Tensor, weight: Tensor) -> Callable[[], None]:
    """The operator alone, or with both gradients if the operands ask for them."""

    def run() -> None:
        result = operator(data, weight)
        if result.requires_grad:
            torch.autograd.grad(result.sum(), (data, weight))

    return run


def _step_rows(model: nn.Module, masks: sk.MaskSet, x: Tensor, y: Tensor, rounds: int) -> list[dict[str, Any]]:
    """A whole training step (loss, gradients, optimizer), each against the dense phase of a plain model."""

    def step(sparse: bool, accelerated: bool) -> Callable[[], None]:
        twin = sk.nn.restore(copy.deepcopy(model)).train()
        own = sk.MaskSet({name: twin.get_parameter(name) for name in masks})
        if sparse:
            own.load_state_dict(masks.state_dict())
        optimizer = sk.MaskedSGD(twin.parameters(), **_HYPER, masks=own)
        if accelerated:
            sk.nn.accelerate(twin, own)

        def run() -> None:
            optimizer.zero_grad()
            functional.cross_entropy(twin(x), y).backward()
            optimizer.step()

        return run

    found = interleaved(
        {
            f"{'sparse' if sparse else 'dense'} phase, {'accelerated' if accelerated else 'plain'}": step(
                sparse, accelerated
            )
            for sparse in (True, False)
            for accelerated in (True, False)
        },
        rounds=rounds,
        device=x.device,
    )
    *others, baseline = found
    return [_row("training step", name, found[name], baseline, found[baseline]) for name in others]
