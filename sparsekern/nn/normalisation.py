"""Batch-norms of an accelerated model on `sparsekern.ops.batch_norm`, with the residual and the ReLU that follow them.

What follows is known in a Sequential and in torchvision's ResNets, whose `forward` these classes repeat.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from sparsekern._direct import plain
from sparsekern.nn.swapping import STATE, Swapped, swap
from sparsekern.ops.batch_norm import batch_norm, fits

_LEAST = 1 << 17
"""Numbers of an input from which on more is gained than the layers of Python here cost, 0.2 ms forward and backward."""


@dataclass
class NormState:
    """Name of a batch-norm and how it ran last."""

    name: str
    last: str = "torch: not run yet"


class FastBatchNorm(Swapped):
    """Mixed into BatchNorm2d."""

    def forward(self, input: Tensor) -> Tensor:
        # torch.compile fuses torch's own operator.
        if torch.compiler.is_compiling() or STATE not in vars(self):
            return super().forward(input)
        reason = _why_torch(self, input)
        if reason is None:
            return _run(self, input)
        getattr(self, STATE).last = f"torch: {reason}"
        return super().forward(input)


def _why_torch(norm: nn.BatchNorm2d, input: Tensor) -> str | None:
    """Why torch's operator must take this call, None if ours can. Errors are torch's, too."""
    if not norm.training:
        return "evaluation"
    if input.device.type != "cpu" or input.dim() != 4 or not fits(input):
        return "input is not contiguous float32 images on CPU, or nothing is compiled"
    if input.numel() < _LEAST:
        return "input is small"
    own = [t for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if t is not None]
    if any(t.dtype != input.dtype or t.shape != input.shape[1:2] or t.device != input.device for t in own):
        return "weight or statistics do not go with the input"
    if not plain(input, *own):
        return "a trace, a mode, a transform of torch.func or forward-mode differentiation"
    return None


def _run(norm: nn.BatchNorm2d, input: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
    output, mean, variance = batch_norm(
        input, norm.weight, norm.bias, residual, activation=activation, eps=norm.eps
    )  # fmt: skip
    if norm.track_running_stats:
        _track(norm, mean, variance, input.numel() // len(mean))
    fused = (" + residual" if residual is not None else "") + (" + ReLU" if activation else "")
    getattr(norm, STATE).last = f"compiled{fused}"
    return output


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """The running statistics, as torch.nn.BatchNorm2d.forward and its operator update them."""
    share = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else share
    # The running variance is that of the population.
    for running, value, scale in ((norm.running_mean, mean, 1.0), (norm.running_var, variance, count / (count - 1))):
        if running is not None:
            running.mul_(1 - share).add_(value, alpha=share * scale)


def _unseen(norm: nn.Module, relu: nn.Module) -> bool:
    """Whether calls of the two do what their classes do, and nothing sees what lies between them."""
    if not (isinstance(norm, FastBatchNorm) and STATE in vars(norm) and type(relu) is nn.ReLU):
        return False
    for module in (norm, relu):
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        if any(hooks) or "forward" in vars(module) or module._compiled_call_impl is not None:
            return False
    return not _has_any_global_hook()


def norm_relu(norm: nn.Module, relu: nn.Module, input: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(input) + residual), in one pass where nobody can tell."""
    if _unseen(norm, relu) and _why_torch(norm, input) is None:
        like = residual is None or (residual.shape == input.shape and residual.is_cpu and fits(residual))
        if like and plain(residual):
            return _run(norm, input, residual, "relu")
    output = norm(input)
    if residual is not None:
        output += residual
    return relu(output)


class FusedSequential(Swapped):
    """Mixed into Sequential."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)
        modules, i = list(self), 0
        while i < len(modules):
            module, after = modules[i], modules[i + 1] if i + 1 < len(modules) else None
            pair = isinstance(module, FastBatchNorm) and type(after) is nn.ReLU
            input = norm_relu(module, after, input) if pair else module(input)
            i += 2 if pair else 1
        return input


class FusedBasicBlock(Swapped):
    """Mixed into torchvision's block of ResNet-18 and -34."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        output = self.conv2(norm_relu(self.bn1, self.relu, self.conv1(x)))
        return norm_relu(self.bn2, self.relu, output, x if self.downsample is None else self.downsample(x))


class FusedBottleneck(Swapped):
    """Mixed into torchvision's block of larger ResNets."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x)
        output = self.conv2(norm_relu(self.bn1, self.relu, self.conv1(x)))
        output = self.conv3(norm_relu(self.bn2, self.relu, output))
        return norm_relu(self.bn3, self.relu, output, x if self.downsample is None else self.downsample(x))


class FusedResNet(Swapped):
    """Mixed into torchvision's ResNet, for the batch-norm of its stem."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super()._forward_impl(x)
        x = self.maxpool(norm_relu(self.bn1, self.relu, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


_RESNET = {
    "BasicBlock": ("forward", FusedBasicBlock), "Bottleneck": ("forward", FusedBottleneck),
    "ResNet": ("_forward_impl", FusedResNet),
}  # fmt: skip
"""Classes of torchvision -> the method that is repeated here, and by what."""


def _container(module: nn.Module) -> type[Swapped] | None:
    """What repeats the forward of this module with fused batch-norms."""
    kind = type(module)
    if kind.forward is nn.Sequential.forward:
        pairs = pairwise(module)
        return FusedSequential if any(_is_norm(a) and type(b) is nn.ReLU for a, b in pairs) else None
    for name, (method, mixin) in _RESNET.items() if (resnet := sys.modules.get("torchvision.models.resnet")) else ():
        if getattr(kind, method, None) is getattr(getattr(resnet, name), method):
            return mixin
    return None


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d


def accelerate_norms(model: nn.Module) -> None:
    """Swap each BatchNorm2d, and what holds one with a ReLU behind it; subclasses with behaviour of their own stay."""
    modules = list(model.named_modules())
    for mixin, module in [(_container(module), module) for _, module in modules]:
        if mixin is not None:
            swap(module, mixin)
    for name, module in modules:
        if _is_norm(module):
            swap(module, FastBatchNorm, NormState(name))
