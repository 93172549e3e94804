"""The cost model of layers on GPUs: its figures, and where it decides."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import doctor
from sparsekern.nn import acceleration, layers, roofline
from sparsekern.nn.roofline import GPUS, PASSES, LayerSize, gpu_of, layer_speeds, pass_speeds, predicted_speeds

networks = pytest.importorskip("benchmarks.networks", reason="needs the checkout")
FLOAT, HALF = torch.float32, torch.float16
# What the design of the kernels was judged by: a reading of shared memory feeds 128 multiply-adds, but 64 of the input
# gradient, which would add up in shared memory.
DESIGN = {("4x1", "forward"): 128, ("4x1", "input"): 64, ("4x1", "weight"): 128}


def size_of(conv, images=256):
    return LayerSize.of(conv.weight_shape, 1, images * conv.size**2, images * conv.output_size**2)


def resnet50(gpu, density, dtype, which):
    """Seconds (sparse, dense) of a pass through all convolutions of a ResNet-50 but the first, 256 images."""
    sizes = map(size_of, networks.resnet50_convs()[1:])
    found = [pass_speeds(GPUS[gpu], size, density, "4x1", dtype, which, DESIGN) for size in sizes]
    return sum(s.sparse for s in found), sum(s.dense for s in found)


# How many times as fast as dense at 90, 95 and 98%, and the dense milliseconds, worked out apart from this code.
@pytest.mark.parametrize(
    ("gpu", "dtype", "which", "times", "dense"),
    [
        ("A100", FLOAT, "forward", (5.2, 7.8, 9.6), 122.7), ("A100", FLOAT, "input", (5.2, 7.8, 9.6), 122.7),
        ("A100", FLOAT, "weight", (5.2, 7.8, 9.6), 122.7), ("H100", FLOAT, "forward", (4.2, 5.2, 5.6), 40.4),
        ("H100", FLOAT, "input", (2.7, 4.2, 5.4), 40.4), ("H100", FLOAT, "weight", (4.2, 5.2, 5.6), 40.4),
        ("A100", HALF, "forward", (1.57, 1.73, 1.78), 10.9), ("A100", HALF, "weight", (1.57, 1.73, 1.78), 10.9),
        ("H100", HALF, "forward", (1.21, 1.33, 1.38), 4.9), ("H100", HALF, "weight", (1.21, 1.33, 1.38), 4.9),
        ("A100", HALF, "input", (1, 1, 1), 10.9), ("H100", HALF, "input", (1, 1, 1), 4.9),  # no sparse kernel
    ],
)  # fmt: skip
def test_a_whole_network_takes_what_was_worked_out_for_it(gpu, dtype, which, times, dense):
    found = [resnet50(gpu, density, dtype, which) for density in (0.1, 0.05, 0.02)]
    assert [d / s for s, d in found] == pytest.approx(times, rel=0.02)
    assert found[0][1] * 1e3 == pytest.approx(dense, rel=0.01)


def test_late_layers_gain_and_memory_bound_ones_do_not():
    late, early = LayerSize.of((512, 512, 3, 3), 1, 12544, 12544), LayerSize.of((256, 64, 1, 1), 1, 802816, 802816)
    for gpu, times in (("A100", (2.6, 5.1)), ("H100", (1.7, 3.1))):
        found = [pass_speeds(GPUS[gpu], late, d, "4x1", HALF, "forward") for d in (0.1, 0.05)]
        assert [s.dense / s.sparse for s in found] == pytest.approx(times, rel=0.03)
        tied = pass_speeds(GPUS[gpu], early, 0.1, "4x1", HALF, "forward")
        assert tied.sparse == tied.dense and not tied and tied.predicted


def test_patterns_differ_as_the_kernels_do():
    late = LayerSize.of((512, 512, 3, 3), 1, 12544, 12544)
    seconds = {
        (layout, which): pass_speeds(GPUS["H100"], late, 0.1, layout, FLOAT, which).sparse
        for layout in ("4x1", "1x4", "unstructured")
        for which in PASSES
    }
    assert seconds["4x1", "forward"] == seconds["1x4", "input"] < seconds["1x4", "forward"] == seconds["4x1", "input"]
    assert seconds["unstructured", "weight"] > seconds["4x1", "weight"]
    parts = [pass_speeds(GPUS["H100"], late, 0.1, "1x4", FLOAT, which) for which in PASSES]
    whole = layer_speeds(GPUS["H100"], late, 0.1, "1x4", FLOAT)
    assert (whole.sparse, whole.dense) == pytest.approx((sum(p.sparse for p in parts), sum(p.dense for p in parts)))


def properties(name, major, minor=0, **more):
    return SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=80, **more)


def test_gpus_are_known_by_name_or_by_their_properties():
    assert gpu_of(properties("NVIDIA A100-SXM4-80GB", 8)) is GPUS["A100"]
    assert gpu_of(properties("NVIDIA H200", 9)) is GPUS["H200"]
    clocks = dict(clock_rate=1_700_000, memory_clock_rate=10_000_000, memory_bus_width=384)
    other = gpu_of(properties("another", 8, 9, **clocks))
    assert (other.processors, other.clock, other.bandwidth, other.cores) == (80, 1.7e9, 9.6e11, 128)
    assert gpu_of(properties("another", 8, 9)) is None and gpu_of(properties("old", 7, **clocks)) is None


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def is_cuda(self):
        return True


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="NVIDIA H100 PCIe"))
    return GPUS["H100"]


@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_is_predicted_by_its_sizes(h100, grad):
    with torch.set_grad_enabled(grad):
        for module, x, out in [
            (nn.Conv2d(8, 12, 3, 2, 1), torch.randn(5, 8, 9, 11), 5 * 5 * 6),
            (nn.Conv2d(8, 12, 3, dilation=2), torch.randn(8, 9, 11), 5 * 7),
            (nn.Conv2d(8, 12, (3, 5), padding="same", groups=2), torch.randn(2, 8, 9, 11), 198),
            (nn.Linear(8, 12), torch.randn(3, 4, 8), 12),
        ]:
            result = module(x)
            assert layers.output_pixels(module, x) == result.numel() // 12 == out
            structure = sk.ops.sparse_structure(torch.rand(module.weight.shape) < 0.3, groups=layers.groups_of(module))
            into = x.numel() // 8
            images = None if isinstance(module, nn.Linear) else x.shape[0] if x.dim() == 4 else 1
            size = LayerSize.of(tuple(module.weight.shape), structure.groups, into, out, images)
            assert size.values == x.numel() + result.numel()
            passes = ("forward", "weight") if grad else ("forward",)
            density = structure.kept / module.weight.numel()
            want = layer_speeds(h100, size, density, "unstructured", FLOAT, passes)
            assert predicted_speeds(module, structure, x.as_subclass(OnGpu)) == want


@pytest.mark.parametrize(("dtype", "together"), [(FLOAT, 4), (HALF, 8)])
def test_images_that_are_not_there_take_time_too(h100, dtype, together):
    def seconds(images, kernel, padding):
        layer = nn.Conv2d(512, 512, kernel, padding=padding).requires_grad_(False)
        structure = SimpleNamespace(shape=tuple(layer.weight.shape), groups=1, layout="4x1", kept=layer.weight.numel())
        x = torch.empty(images, 512, 7, 7, dtype=dtype).as_subclass(OnGpu)
        return predicted_speeds(layer, structure, x).sparse

    of_a_window = [seconds(n, 3, 1) for n in (1, together, together + 1)]
    assert of_a_window == pytest.approx([of_a_window[0], of_a_window[0], 2 * of_a_window[0]])
    assert seconds(1, 1, 0) < seconds(together, 1, 0) < seconds(together + 1, 1, 0)


def test_what_the_model_does_not_know(monkeypatch):
    layer = nn.Linear(8, 8)
    structure = sk.ops.sparse_structure(torch.rand(8, 8) < 0.3)
    with pytest.raises(ValueError, match="input is on cpu: the model is of GPUs"):
        predicted_speeds(layer, structure, torch.randn(2, 8))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties("old", 7))
    assert predicted_speeds(layer, structure, torch.randn(2, 8).as_subclass(OnGpu)) is False


def test_a_measurement_replaces_what_was_predicted_during_capture(monkeypatch, h100):
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    masks = sk.MaskSet({"w": model[0].weight})
    masks.set("w", torch.rand(8, 8) < 0.5)
    asked, capturing = [], [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(acceleration, "measured_speeds", lambda *a: asked.append("measured") or sk.nn.Speeds(2, 1))
    monkeypatch.setattr(
        acceleration, "predicted_speeds", lambda *a: asked.append("predicted") or sk.nn.Speeds(1, 2, predicted=True)
    )
    sk.nn.accelerate(model, masks)
    x = torch.randn(2, 8).as_subclass(OnGpu)
    decide = lambda: getattr(model[0], acceleration.STATE).structure_for(model[0], x)  # noqa: E731
    assert decide() is not None and "dense (predicted)" in str(sk.nn.acceleration_report(model))
    capturing[0] = False
    assert decide() is None and decide() is None
    assert asked == ["predicted", "measured"]
    capturing[0] = True
    assert decide() is None and asked == ["predicted", "measured"]


def test_the_doctor_shows_the_model_and_calls_it_one(monkeypatch):
    report = doctor.report()
    assert "predicted by a model, not measured: float32, 4x1, 95% sparse" in report
    (line,) = [line for line in report.splitlines() if "3x3 512, 7x7" in line]
    assert torch.cuda.is_available() or (line.count(" ms") == len(GPUS) and "H100 sparse, 0.99 against 3.53 ms" in line)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="NVIDIA H200"))
    rows = dict(doctor._predictions())
    assert all(text.count(" ms") == 1 and "H200" in text for text in rows.values())
    assert roofline.GPUS.keys() == {"A100", "H100", "H200"}
