"""What this machine can compile, for setup.py. Each answer comes with its reason, in one line that says what to do."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

# Fails on a compiler without C++20 or without its standard library.
PROBE = "#include <bit>\n#include <span>\nint f(std::span<const int> s) { return std::popcount(unsigned(s.size())); }\n"


def cuda_decision() -> str:
    """Why no CUDA kernels are built; SystemExit where SPARSEKERN_CUDA demands them or is not understood."""
    wish = os.environ.get("SPARSEKERN_CUDA", "auto")
    if wish not in ("auto", "require", "off"):
        raise SystemExit(f"SPARSEKERN_CUDA: got {wish!r}, allowed are auto, require, off")
    if wish == "require":
        raise SystemExit("SPARSEKERN_CUDA=require: this version has no CUDA kernels to build; use auto or off")
    return f"none (SPARSEKERN_CUDA={wish}): this version has no CUDA kernels to build"


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
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".cpp", ".h", ".inc"))
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
