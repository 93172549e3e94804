"""Builds csrc/cuda with g++ to run on this CPU: what it takes, and where the result is kept."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "csrc/cuda"
OPERATORS = ["masked_sgd_"]
"""What csrc/cuda registers."""
FLAGS = ["-std=c++20", "-O2", "-mfma", "-ffp-contract=off", "-fPIC", "-pthread", "-Wall", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-tsan", f"-I{HERE}", f"-I{KERNELS}"]


@functools.cache
def include_flags() -> list[str]:
    """Where CUDA's headers are, of a toolkit or of the packages in requirements-dev.txt; [] where there are none."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia else []
    roots += [root for folder in folders or [] for root in sorted(Path(folder).glob("cu*"))]
    for include in (root / "include" for root in [*roots, Path("/usr/local/cuda")]):
        targets = [include / "nv/target", include / "cccl/nv/target"]
        if (include / "cuda_bf16.h").exists() and any(t.exists() for t in targets):
            return ["-isystem", str(include), "-isystem", str(include / "cccl")]
    return []


def obstacle() -> str:
    """Why kernels cannot be emulated here, '' if they can."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"the emulator switches fibers in x86-64 assembly, this is {platform.machine()}"
    if not shutil.which("g++"):
        return "the emulator needs g++"
    if not include_flags():
        return "the emulator needs the headers of CUDA: pip install -r requirements-dev.txt"
    return ""


def build(name: str, sources: list[Path], flags: list[str] | None = None, seen: list[Path] | None = None) -> Path:
    """The shared library (or, for a name without ".so", the program) of `sources`, built at most once per content.

    `seen` are further files or folders whose change asks for a new build.
    """
    flags = [*FLAGS, *(flags or []), *include_flags()]
    depends = [Path(__file__), *HERE.glob("*.h"), *KERNELS.glob("*.cuh"), *KERNELS.glob("*.h"), *sources, *(seen or [])]
    digest = hashlib.sha256("\0".join(flags).encode() + b"".join(p.read_bytes() for p in sorted(depends))).hexdigest()
    target = ROOT / "build/emulator" / digest[:16] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    objects = [target.parent / f"{name}.{source.name}.{os.getpid()}.o" for source in sources]
    jobs = [
        subprocess.Popen(
            ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(o)], stderr=subprocess.PIPE, text=True
        )
        for source, o in zip(sources, objects, strict=True)
    ]
    errors = [job.communicate()[1] for job in jobs]
    if any(job.returncode for job in jobs):
        raise RuntimeError("\n".join(errors))
    partial = target.with_name(f"{name}.{os.getpid()}.partial")
    kind = ["-shared"] if name.endswith(".so") else []
    libraries = [flag for flag in flags if flag.startswith("-l")]  # the linker wants them behind what needs them
    subprocess.run(["g++", *flags, *kind, *map(str, objects), *libraries, "-o", str(partial)], check=True)
    for o in objects:
        o.unlink()
    partial.replace(target)
    return target


def sanitized(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a program built with a sanitizer, in the way that fibers and a fixed address space need."""
    still = ["setarch", "-R"] if shutil.which("setarch") else []  # ThreadSanitizer maps fixed addresses
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0", "TSAN_OPTIONS": "report_bugs=1"}
    return subprocess.run([*still, *command], capture_output=True, text=True, env={**os.environ, **options})


@functools.cache
def build_operators() -> Path:
    """The operators of csrc/cuda on emulated kernels, a library for torch.ops.load_library.

    It serves CPU tensors in the namespace sparsekern_emulated, whose schemas the caller defines.
    """
    from torch.utils import cpp_extension

    includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    flags = ["-DSPARSEKERN_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes]
    flags += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10", "-ltorch"]
    shared = [ROOT / "csrc/step_operands.h", ROOT / "csrc/cpu/simd/kernels.h"]
    sources = sorted([*KERNELS.glob("*.cu"), *KERNELS.glob("*.cpp"), HERE / "schedule.cpp"])
    return build("operators.so", sources, flags, shared)
