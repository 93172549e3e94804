"""Registers operators with the dispatcher and loads the compiled kernels where they were built."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparsekern import _direct

_definitions = torch.library.Library("sparsekern", "DEF")
OPS: dict[str, Callable[..., Any]] = {}
"""Name of each operator -> its plain PyTorch reference."""
NATIVE: dict[str, str] = {}
"""Name of each operator whose compiled kernel has a schema of its own -> name of that."""
_natives: list[str] = []
SERVED_ON_CUDA: dict[str, Callable[..., Any]] = {}
"""Name of each operator that Python serves on CUDA by compiled functions -> how."""
SETTINGS = ("auto", "cuda", "triton", "reference")
"""What SPARSEKERN_BACKEND may be."""
kernels_loaded = False
cuda_obstacle = "SPARSEKERN_BACKEND=reference is set"
"""Why the CUDA kernels are not in use, '' if they are (which needs no GPU)."""
cuda_operators: frozenset[str] = frozenset()
"""The operators that the CUDA library serves."""


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `sparsekern::schema`; `reference` serves every device that has no kernel of its own."""
    name = schema[: schema.index("(")]
    _definitions.define(schema)
    _definitions.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekern::{name}", fake, lib=_definitions)
    OPS[name] = reference
    return getattr(torch.ops.sparsekern, name)


def define_native(schema: str) -> Any:
    """Define `sparsekern::schema`, a compiled function that Python code on CPU calls; nothing else serves it."""
    name = schema[: schema.index("(")]
    _definitions.define(schema)
    _natives.append(name)
    return getattr(torch.ops.sparsekern, name).default


def define_cpu(name: str, native: Any, serve: Callable[..., Any]) -> None:
    """Serve operator ``name`` on CPU by the Python function ``serve``, which calls ``native`` where that was built."""
    if not interpreted():
        _definitions.impl(name, serve, "CPU")
    NATIVE[name] = native.name().removeprefix("sparsekern::")


def define_cuda(native: str, serve: dict[str, Callable[..., Any]]) -> Any:
    """Define `sparsekern::native`, a compiled function; where it is built, ``serve`` has operators for CUDA by name."""
    _definitions.define(native)
    SERVED_ON_CUDA.update(serve)
    return getattr(torch.ops.sparsekern, native[: native.index("(")]).default


def register(name: str, kernel: Callable[..., Any], key: str) -> None:
    """Serve operator ``name`` on dispatch key ``key`` by a Python function."""
    _definitions.impl(name, kernel, key)


def has_kernel(name: str, key: str) -> bool:
    """Whether operator `name` has a compiled kernel for dispatch key `key` ("CPU", "CUDA")."""
    if key == "CPU":
        name = NATIVE.get(name, name)
    there = torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekern::{name}", key)
    return there and (key != "CPU" or kernels_loaded)


def build_info() -> dict[str, Any]:
    """What was decided when the package was built, and why; empty when nothing was."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """As torch.zeros_like, for what lives long: on a CPU the system is asked for huge pages."""
    found = torch.empty_like(tensor)
    if kernels_loaded and found.device.type == "cpu":
        torch.ops.sparsekern.advise_huge_pages(found)  # before the memory is written for the first time
    return found.zero_()


def backend_setting() -> str:
    """SPARSEKERN_BACKEND; `sparsekern.backends` says what its values mean."""
    setting = os.environ.get("SPARSEKERN_BACKEND", "auto")
    if setting not in SETTINGS:
        raise ValueError(f"SPARSEKERN_BACKEND: got {setting!r}, allowed are {', '.join(SETTINGS)}")
    return setting


def interpreted() -> bool:
    """Whether CPU tensors are to run on interpreted Triton kernels."""
    return backend_setting() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def load_kernels() -> str:
    """Load the operator library; returns '' or why the references are used, which is also warned of, once.

    A failure to load never stops the import. An unknown SPARSEKERN_BACKEND or SPARSEKERN_CPU_ISA does.
    """
    # The operators that compute nothing, hence have no reference.
    _definitions.define("cpu_isa() -> str")
    _definitions.define("set_cpu_isa(str cap) -> ()")
    _definitions.define("advise_huge_pages(Tensor memory) -> ()")
    if backend_setting() == "reference":
        return "SPARSEKERN_BACKEND=reference is set; unset it to use the compiled kernels"
    if interpreted():
        return "SPARSEKERN_BACKEND=triton and TRITON_INTERPRET=1 are set, which interprets the GPU kernels; unset them"
    reason = _load()
    if reason:
        warnings.warn(f"{reason}. The slow PyTorch references are used.", RuntimeWarning, stacklevel=3)
    global cuda_obstacle, cuda_operators
    cuda_obstacle = _load_cuda()
    cuda_operators = frozenset(name for name in OPS if has_kernel(name, "CUDA"))
    return reason


def _load() -> str:
    found = sorted(Path(__file__).parent.glob("_ops*.so"))
    if not found:
        why = build_info().get("decisions", {}).get("kernels", "install a C++ compiler and reinstall")
        return f"sparsekern was installed without its compiled kernels ({why})"
    if failure := _failure_to_load(found[0]):
        return failure
    torch.ops.sparsekern.cpu_isa()  # an unknown SPARSEKERN_CPU_ISA must fail here, not in the first step
    global kernels_loaded
    kernels_loaded = True
    missing = [name for name in (*NATIVE, *_natives) if not has_kernel(name, "CPU")]
    kernels_loaded = not missing
    if kernels_loaded:
        _direct.connect(found[0])
    return f"{found[0].name} is older than the Python code, it lacks {', '.join(missing)}; reinstall" if missing else ""


def _failure_to_load(library: Path) -> str:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        built = build_info().get("torch", "of an unknown version")
        return (
            f"{library.name} does not load ({error.__cause__ or error}). It was built with torch {built}, this is "
            f"torch {torch.__version__}: reinstall with pip install --no-build-isolation --force-reinstall --no-deps"
        )
    return ""


def _load_cuda() -> str:
    """Load the CUDA kernels, for which no driver is needed; '' or why GPU tensors do without."""
    if backend_setting() == "triton":
        return "SPARSEKERN_BACKEND=triton is set"
    found = sorted(Path(__file__).parent.glob("_cuda*.so"))
    if torch.version.cuda is None:
        return "this torch is built for CPU only"
    if not found:
        why = build_info().get("decisions", {}).get("CUDA", "install CUDA's nvcc and reinstall")
        return f"sparsekern was installed without its CUDA kernels ({why})"
    if failure := _failure_to_load(found[0]):
        return failure
    for name, serve in SERVED_ON_CUDA.items():
        _definitions.impl(name, serve, "CUDA")
    return ""
