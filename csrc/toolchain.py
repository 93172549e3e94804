"""What this machine can compile, for setup.py. Each answer comes with its reason, in one line that says what to do."""

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Fails on a compiler without C++20 or without its standard library.
PROBE = "#include <bit>\n#include <span>\nint f(std::span<const int> s) { return std::popcount(unsigned(s.size())); }\n"


KERNEL = "#include <cuda_bf16.h>\n__global__ void k(__nv_bfloat16* x) { *x = __float2bfloat16_rn(1); }\n"
# What is built unless TORCH_CUDA_ARCH_LIST says otherwise: A100 (and, of the same code, 30xx, 40xx), H100, B200, 50xx.
ARCHITECTURES = (80, 90, 100, 120)


@dataclass(frozen=True)
class Cuda:
    """A toolkit that compiles for this torch; `flags` say for which architectures."""

    nvcc: str
    root: Path
    flags: tuple[str, ...]


def cuda_decision(torch_cuda: str | None, compiler: str) -> tuple[Cuda | None, str]:
    """The toolkit to build CUDA kernels with, or None, and what is built or why nothing is.

    `torch_cuda` is the version that torch is built with. SystemExit where SPARSEKERN_CUDA is not understood, or is
    "require" and nothing can be built.
    """
    wish = os.environ.get("SPARSEKERN_CUDA", "auto")
    if wish not in ("auto", "require", "off"):
        raise SystemExit(f"SPARSEKERN_CUDA: got {wish!r}, allowed are auto, require, off")
    if wish == "off":
        return None, "none (SPARSEKERN_CUDA=off)"
    found, about = find_cuda(torch_cuda, compiler)
    if found is None and wish == "require":
        raise SystemExit(f"SPARSEKERN_CUDA=require: {about}; or use auto or off")
    return found, about if found else f"none (SPARSEKERN_CUDA={wish}), GPU tensors take slower paths: {about}"


def find_cuda(torch_cuda: str | None, compiler: str) -> tuple[Cuda | None, str]:
    """The toolkit of torch's CUDA version, tried on a small kernel, or None and the reason."""
    if not torch_cuda:
        return None, "this torch is built for CPU only; install one with CUDA"
    if not compiler:
        return None, "no C++ compiler"
    roots = cuda_roots(torch_cuda)
    versions = {root: nvcc_version(root) for root in roots if (root / "bin/nvcc").exists()}
    if not versions:
        looked = ", ".join(map(str, roots))
        return None, f"no nvcc found (looked in {looked}); install CUDA {torch_cuda} or set CUDA_HOME, and reinstall"
    fitting = [root for root, (major, minor) in versions.items() if str(major) == torch_cuda.split(".")[0]]
    if not fitting:
        there = ", ".join(f"{root} has {major}.{minor}" for root, (major, minor) in versions.items())
        return None, f"torch is built with CUDA {torch_cuda}, but {there}; point CUDA_HOME to that version"
    root = fitting[0]
    nvcc = str(root / "bin/nvcc")
    if versions[root] < (12, 1):
        return None, f"{nvcc} is older than CUDA 12.1, of which kernels with long parameters are"
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    flags = architecture_flags({int(name[3:]) for name in known if name[3:].isdigit()})
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(KERNEL)
        host = shlex.split(compiler)[-1]
        probe = [nvcc, "-std=c++20", "-ccbin", host, flags[0], "-c", str(source), "-o", str(source.with_suffix(".o"))]
        tried = subprocess.run(probe, capture_output=True, text=True)
    if tried.returncode:
        reason = ((tried.stdout + tried.stderr).strip().splitlines() or ["no message"])[0]
        return None, f"{nvcc} cannot compile a small kernel ({reason}); set CXX to a compiler that it supports"
    names = ", ".join(flag.rpartition("code=")[2].strip("[]") for flag in flags)
    return Cuda(nvcc, root, flags), f"{names}; CUDA {'.'.join(map(str, versions[root]))} in {root}"


def nvcc_version(root: Path) -> tuple[int, int]:
    said = subprocess.run([str(root / "bin/nvcc"), "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def cuda_roots(torch_cuda: str) -> list[Path]:
    """Folders that may hold a toolkit, best first; CUDA_HOME or CUDA_PATH alone where it is set."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return [Path(os.environ[name])]
    roots = []
    if command := shutil.which("nvcc"):
        roots.append(Path(command).resolve().parents[1])
    roots.append(Path("/usr/local/cuda"))
    # Of the packages nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm and nvidia-cuda-cccl.
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations if nvidia else None) or []:
        roots.append(Path(folder) / f"cu{torch_cuda.split('.')[0]}")
    return [root for root in roots if (root / "include/cuda_runtime.h").exists()] or roots


def architecture_flags(known: set[int]) -> tuple[str, ...]:
    """Flags for TORCH_CUDA_ARCH_LIST (such as "8.0;9.0+PTX"), else for ARCHITECTURES, with PTX for newer ones."""
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    if not wish:
        chosen = [a for a in ARCHITECTURES if a in known]
        wish = ";".join(f"{a // 10}.{a % 10}" for a in chosen) + "+PTX"
    flags = []
    for part in filter(None, wish.split(";")):
        number = part.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"[0-9]{2,3}[af]?", number):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got {wish!r}, expected numbers such as 8.0;9.0+PTX")
        code = f"[sm_{number},compute_{number}]" if part.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return tuple(flags)


def link_arguments(cuda: Cuda, torch_cuda: str) -> list[str]:
    """The shared CUDA runtime by its versioned name, which torch has loaded by then; packages have no other."""
    name = f"libcudart.so.{torch_cuda.split('.')[0]}"
    folder = next(
        (cuda.root / lib for lib in ("lib64", "lib") if (cuda.root / lib / name).exists()), cuda.root / "lib64"
    )
    return [f"-L{folder}", f"-l:{name}", "-ltorch_cuda"]


def find_compiler() -> tuple[str, str]:
    """Command of the C++20 compiler ('' where there is none) and its version or the reason.

    A missing compiler drops the kernels. One that is too old is a SystemExit: nobody would notice the slow package.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    command = next((name for name in names if shutil.which(shlex.split(name)[0])), "")
    if platform.system() == "Windows":
        return "", "the kernels do not build on Windows yet"
    if not command:
        return "", f"no C++ compiler found (looked for {', '.join(names)}); install g++ and reinstall"
    run = shlex.split(command)
    if subprocess.run([*run, "-std=c++20", "-xc++", "-fsyntax-only", "-"], input=PROBE, text=True).returncode:
        raise SystemExit(
            f"sparsekern build: {command} cannot compile C++20 (its message is above). "
            "Set CXX to g++ >= 11 or clang++ >= 14, or CXX=none to install without compiled kernels"
        )
    version = subprocess.run([*run, "--version"], capture_output=True, text=True).stdout
    return command, (version.splitlines() or [command])[0]


def compile_if_changed(command: list[str], target: Path) -> None:
    """Run a compiler that writes `target`, unless it, the command and all files that it read are as they were then.

    nvcc comes without the dependency tracking that ninja gives the other files.
    """
    record, depends = target.with_suffix(".command"), target.with_suffix(".d")
    if target.exists() and record.exists() and depends.exists() and record.read_text() == repr(command):
        files = depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        if all(Path(f).exists() and Path(f).stat().st_mtime <= target.stat().st_mtime for f in files):
            return
    print(shlex.join(command))
    subprocess.run([*command, "-MD", "-MF", str(depends)], check=True)
    record.write_text(repr(command))


def module_obstacle() -> str:
    """Why the pybind11 module cannot be built, '' if it can."""
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is missing; pip install pybind11 and reinstall"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the Python headers are missing; apt-get install python3-dev and reinstall"
    return ""


def sources_digest() -> str:
    """SHA-256 of what the compiled pieces are made from, so that the doctor can tell an old build from its checkout."""
    folder = Path(__file__).parent
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".cpp", ".h", ".inc", ".cu", ".cuh"))
    parts = [p.relative_to(folder).as_posix().encode() + p.read_bytes() for p in files]
    return hashlib.sha256(b"\0".join([*parts, (folder.parent / "setup.py").read_bytes()])).hexdigest()


def jobs() -> int:
    """MAX_JOBS, else one job per usable core that has 1 GiB of free memory; a file takes about half of that."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    memory = Path("/proc/meminfo")
    if memory.exists():
        limits.append(int(memory.read_text().split("MemAvailable:")[1].split()[0]) >> 20)
    group = Path("/sys/fs/cgroup/memory.max")
    if group.exists() and group.read_text().strip().isdigit():
        limits.append(int(group.read_text()) >> 30)
    return max(1, min(limits))
