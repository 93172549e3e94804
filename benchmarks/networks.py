"""Shapes of the networks that the benchmarks speak of, with torchvision's names and without torchvision.

ResNet-50 (arXiv 1512.03385, with stride 2 in the 3x3 convolution as torchvision has it) and MobileNetV1 (arXiv
1704.04861), both for 224x224 images.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Conv:
    """One convolution: square kernel, square image of `size` x `size`, no bias, one group."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def output_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.outputs, self.inputs, self.kernel, self.kernel

    @property
    def shape_key(self) -> tuple[int, ...]:
        """Equal for layers of the same speed."""
        return self.inputs, self.outputs, self.kernel, self.stride, self.size


def resnet50_convs() -> list[Conv]:
    """The 53 convolutions in the order of the model's state dict; the first is the stem."""
    convs = [Conv("resnet50/conv1", 3, 64, 7, 2, 224)]
    inputs, size = 64, 56
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            name = f"resnet50/layer{stage}.{block}."
            convs.append(Conv(name + "conv1", inputs, width, 1, 1, size))
            convs.append(Conv(name + "conv2", width, width, 3, stride, size))
            convs.append(Conv(name + "conv3", width, 4 * width, 1, 1, size // stride))
            if block == 0:
                convs.append(Conv(name + "downsample.0", inputs, 4 * width, 1, stride, size))
            inputs, size = 4 * width, size // stride
    return convs


def resnet50_parameters() -> dict[str, tuple[int, ...]]:
    """Name -> shape of all 161 parameters, in the order of `model.parameters()`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for conv in resnet50_convs():
        name = conv.name.removeprefix("resnet50/")
        norm = name.replace("downsample.0", "downsample.1").replace("conv", "bn")
        shapes |= {f"{name}.weight": conv.weight_shape}
        shapes |= {f"{norm}.weight": (conv.outputs,), f"{norm}.bias": (conv.outputs,)}
    return {**shapes, "fc.weight": (1000, 2048), "fc.bias": (1000,)}


def mobilenet_v1_pointwise() -> list[Conv]:
    """The 13 pointwise convolutions; together with the classifier they hold nearly all of the weights."""
    channels = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    sizes = [112, 56, 56, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7]
    return [
        Conv(f"mobilenet_v1/pointwise{i + 1}", channels[i], channels[i + 1], 1, 1, size) for i, size in enumerate(sizes)
    ]
