"""What runs here, on what, how it was built, and what to do about each degradation.

The report is made to be pasted into an issue; it names no user and no host.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import sparsekern as sk
from sparsekern import _direct, _library, backends, layer_choices
from sparsekern.nn import roofline

VARIABLES = ("SPARSEKERN_BACKEND", "SPARSEKERN_CPU_ISA", "SPARSEKERN_CUDA")
EXTRAS = {
    "train": {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"},
    "vision": {"torchvision": "torchvision"},
    "ffcv": {"ffcv": "ffcv"},
}
"""Name of each extra -> its modules and their distributions."""
BACKENDS = {
    "compiled": "compiled kernel", "cuda": "compiled kernel", "triton": "Triton kernel",
    "reference": "PyTorch reference (slow)",
}  # fmt: skip
"""What `backends.chosen` says -> how the report puts it."""

PREDICTED = "predicted by a model, not measured: float32, 4x1, 95% sparse, 256 images, forward and gradients"
LAYERS = {  # of a ResNet-50: outputs, inputs, kernel, size of image
    "1x1 64 to 256, 56x56": (256, 64, 1, 56), "3x3 64, 56x56": (64, 64, 3, 56), "3x3 128, 28x28": (128, 128, 3, 28),
    "3x3 256, 14x14": (256, 256, 3, 14), "3x3 512, 7x7": (512, 512, 3, 7), "1x1 2048 to 512, 7x7": (512, 2048, 1, 7),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layers", nargs="?", const="float32", choices=("float32", "bfloat16"), metavar="DTYPE",
        help="also measure sparse against dense layers of ResNet-50 on this CPU, as sk.nn.accelerate does (seconds); "
        "float32 (default) or bfloat16",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Print the report. 0 also when degraded: the report is the result."""
    sys.stdout.write(report(options.layers) + "\n")
    return 0


def report(layers: str | None = None) -> str:
    """Versions, build decisions, machine, the backend of every operator, extras and degradations with their cure; with
    the name of a dtype in `layers`, what `layer_choices` measures for it."""
    parts = {
        "versions": _versions(), "build": _build(), "machine": _machine(), "operators": _operators(),
        f"layers on GPUs, {PREDICTED}": _predictions(), "layers": _layers(layers), "extras": _extras(),
        "environment": ((name, os.environ.get(name, "unset")) for name in VARIABLES),
    }  # fmt: skip
    lines = []
    for title, rows in parts.items():
        rows = list(rows)
        width = max(14, *(len(name) for name, _ in rows))
        lines += [title, *(f"  {name:{width}}  {text}" for name, text in rows)]
    found = degradations()
    return "\n".join([*lines, "degradations", *(f"  - {text}" for text in found or ["none"])])


def degradations() -> list[str]:
    """Each thing that makes this installation slower or less than it could be, with what to do about it."""
    found = [sk.degradation] if sk.degradation else []
    if _sources_changed():
        found.append("the compiled kernels are older than the sources beside them: run make build")
    without = [name for name in sorted(_library.OPS) if not _library.has_kernel(name, "CPU")]
    if without and not sk.degradation:
        found.append(f"this version has no compiled CPU kernel for {', '.join(without)}: nothing to do")
    cap = os.environ.get("SPARSEKERN_CPU_ISA")
    if cap in ("scalar", "avx2") and not sk.degradation:
        found.append(f"SPARSEKERN_CPU_ISA={cap} caps the instruction set: unset it for the fastest one")
    slow = backends.without_gpu_kernels()
    if torch.cuda.is_available() and slow:
        why = backends.why_no_gpu_kernels()
        found.append(f"a GPU is visible, but there is no kernel for {', '.join(slow)}: {why}")
    found += _gpus_without_code()
    if _module() is None and not sk.degradation:
        why = _library.build_info().get("decisions", {}).get("_C", "it was not built")
        found.append(f"the module _C is missing ({why}): small sparse layers take longer and this report tells less")
    elif _direct.obstacle and not sk.degradation:
        found.append(f"small sparse layers are called through the dispatcher: {_direct.obstacle}")
    return found


def _versions() -> Iterator[tuple[str, str]]:
    yield "sparsekern", f"{sk.__version__} in {Path(sk.__file__).parent}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    yield "Python", f"{platform.python_version()} on {platform.platform()}"


def _build() -> Iterator[tuple[str, str]]:
    info = _library.build_info()
    if not info:
        yield "record", "none: this copy was never built; pip install . or make build"
        return
    yield from info["decisions"].items()
    yield "with", f"torch {info['torch']}, Python {info['python']}"
    if module := _module():
        made = module.build_info()
        yield "by", f"{made['compiler']}, C++ {made['cplusplus']}, pybind11 {made['pybind11']}"


def _machine() -> Iterator[tuple[str, str]]:
    yield "CPU", f"{platform.machine()}, {_cores()} usable cores, {torch.get_num_threads()} torch threads"
    if module := _module():
        features = module.cpu_features()
        has, lacks = ([name for name, there in features.items() if there is wanted] for wanted in (True, False))
        yield "features", " ".join(has) + (f"; without {' '.join(lacks)}" if lacks else "") if features else "none"
    yield "kernels use", "nothing" if sk.degradation else torch.ops.sparsekern.cpu_isa()
    yield "small layers", f"through the dispatcher: {why}" if (why := _direct.obstacle) else "called directly"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "GPU", ", ".join(gpus) or "none visible"


def _operators() -> Iterator[tuple[str, str]]:
    for name in sorted(_library.OPS):
        backends = (f"{key.replace('CUDA', 'GPU')}: {_backend(name, key)}" for key in ("CPU", "CUDA"))
        yield name, ", ".join(backends)


def _predictions() -> Iterator[tuple[str, str]]:
    """What the cost model says of the GPUs that are visible, else of those that it knows."""
    there = [roofline.gpu_of(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    gpus = {gpu.name: gpu for gpu in there if gpu} or roofline.GPUS
    for name, (out, channels, kernel, size) in LAYERS.items():
        layer = roofline.LayerSize.of((out, channels, kernel, kernel), 1, 256 * size**2, 256 * size**2)
        found = {gpu: roofline.layer_speeds(gpus[gpu], layer, 0.05, "4x1", torch.float32) for gpu in gpus}
        yield (
            name,
            "; ".join(
                f"{gpu} {'sparse' if s else 'dense'}, {s.sparse * 1e3:.2f} against {s.dense * 1e3:.2f} ms"
                for gpu, s in found.items()
            ),
        )


def _backend(name: str, key: str) -> str:
    return BACKENDS[backends.chosen(name, key)]


def _layers(dtype: str | None) -> Iterator[tuple[str, str]]:
    if dtype is None:
        yield "sparse or dense", "decided per layer by measurement: sparsekern doctor --layers shows it"
        return
    yield from layer_choices.rows(getattr(torch, dtype))
    yield from zip(("to override", ""), layer_choices.OVERRIDE.splitlines(), strict=True)


def _gpus_without_code() -> Iterator[str]:
    """The CUDA library is chosen without a look at the GPU; here is the look."""
    codes = re.findall(r"\b(sm|compute)_(\d+)\b", _library.build_info().get("decisions", {}).get("CUDA", ""))
    for i in range(torch.cuda.device_count() if _library.cuda_operators else 0):
        major, minor = torch.cuda.get_device_capability(i)
        # Machine code serves later chips of its generation, PTX all later ones.
        numbers = [(kind, *divmod(int(number), 10)) for kind, number in codes]
        if not any((major, minor) >= (m, n) and (kind == "compute" or major == m) for kind, m, n in numbers):
            arch = f"{major}.{minor}"
            yield (
                f"the CUDA library holds no code for {torch.cuda.get_device_name(i)} ({arch}): set "
                f"SPARSEKERN_BACKEND=triton, or reinstall with TORCH_CUDA_ARCH_LIST={arch}"
            )


def _extras() -> Iterator[tuple[str, str]]:
    for extra, modules in EXTRAS.items():
        there = {distribution: bool(importlib.util.find_spec(module)) for module, distribution in modules.items()}
        found = [f"{name} {importlib.metadata.version(name)}" for name, is_there in there.items() if is_there]
        missing = ", ".join(name for name, is_there in there.items() if not is_there)
        cure = [f"without {missing}: pip install 'sparsekern[{extra}]'"] if missing else []
        yield extra, "; ".join([*([", ".join(found)] if found else []), *cure])


def _module():
    return _direct._C


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sources_changed() -> bool:
    """Whether this is a checkout whose C++ differs from what was compiled."""
    script = Path(sk.__file__).parents[1] / "csrc" / "toolchain.py"
    built = _library.build_info().get("sources")
    return bool(built) and script.exists() and runpy.run_path(str(script))["sources_digest"]() != built
