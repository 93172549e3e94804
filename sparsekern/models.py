"""The networks that the training program knows: plain modules, nothing sparse about them."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from sparsekern.recipe import Model


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut; (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def residual(channels: int, classes: int, width: int, stride: int = 1) -> nn.Module:
    """Seven 3x3 convolutions for small images; (N, channels, H, W) -> (N, classes)."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            bn=nn.BatchNorm2d(width),
            relu=nn.ReLU(),
            block1=Block(width, width, 1),
            block2=Block(width, 2 * width, 2),
            block3=Block(2 * width, 2 * width, 1),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(2 * width, classes),
        )
    )


def build(settings: Model, channels: int, classes: int) -> nn.Module:
    """The network that a recipe names, freshly initialised from torch's global random state."""
    return {"residual": residual}[settings.name](channels, classes, settings.width, settings.stride)
