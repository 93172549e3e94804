"""What a compiler made of the CUDA kernels: registers, local memory and machine instructions, without a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

CLASSES = {
    "spills": r"(LDL|STL)\b",
    "tensor core": r"(HMMA|HGMMA|UTC\w*MMA)\b",
    "load 16 B": r"LDG\.E.*\.128",
    "store 16 B": r"STG\.E.*\.128",
    "async copy": r"LDGSTS",
    "ldmatrix": r"LDSM",
    "shared load 16 B": r"LDS\.128",
    "fma": r"FFMA",
    "ballot": r"VOTE",
}
"""Name of a class of instructions -> pattern of its opcodes. LDGSTS is no LDG: it does not go through registers."""


def tool() -> str:
    """cuobjdump of triton's wheel or of a toolkit, '' without one; nvdisasm lies beside it."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    found = [str(folder / "cuobjdump") for folder in folders if (folder / "cuobjdump").exists()]
    return found[0] if found else shutil.which("cuobjdump") or ""


def _run(*arguments: str) -> str:
    path = os.pathsep.join([str(Path(tool()).parent), os.environ["PATH"]])
    return subprocess.run(
        [tool(), *arguments], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    ).stdout


def architectures(library: Path) -> dict[str, list[str]]:
    """Kinds of code in the library ("elf", "ptx") -> architectures."""
    return {
        kind: sorted(set(re.findall(r"\.(sm_\d+\w?)\.", _run(f"--list-{kind}", str(library)))))
        for kind in ("elf", "ptx")
    }


def take(library: Path, architecture: str) -> dict[str, Counter[str]]:
    """Short name of each kernel -> its figures: "registers", "local" bytes per thread, and each of CLASSES."""
    usage = _run("-res-usage", "-arch", architecture, str(library))
    figures: dict[str, Counter[str]] = {}
    for name, registers, stack, local in re.findall(
        r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
    ):
        figures[name] = Counter({"registers": int(registers), "local": int(stack) + int(local)})
    kernel = ""
    for line in _run("-sass", "-arch", architecture, str(library)).splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            kernel = found[1]
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            figures[kernel].update(name for name, pattern in CLASSES.items() if re.match(pattern, found[1]))
    names = subprocess.run(["c++filt"], input="\n".join(figures), capture_output=True, text=True, check=True).stdout
    return {short(name): found for name, found in zip(names.splitlines(), figures.values(), strict=True)}


def short(name: str) -> str:
    """A demangled name without return type, namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\b(\w+::)+", "", name.removeprefix("void "))
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and not depth:
            return name[:i]
    return name
