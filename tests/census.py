"""What a GPU compiler emitted, counted from machine code, and a budget that fails with the kernel and the figure named.

Needs no GPU. cuobjdump and nvdisasm come with the triton wheel or with a CUDA toolkit. A budget is JSON:

    {"KERNEL": {"ARCH": {"FIGURE": "<= 64"}}}

KERNEL is the demangled name without its parameters, ARCH is "sm_90" or "all", FIGURE is one of `FIGURES` and the
comparison is one of <=, >=, ==. A kernel without a budget, and a budget without its kernel, are breaches too.
"""

from __future__ import annotations

import functools
import importlib.util
import operator
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

RESOURCES = {"registers": "REG", "stack": "STACK", "shared": "SHARED", "local": "LOCAL"}
"""Per thread (registers; bytes of stack and local memory) or per block (bytes of static shared memory)."""
INSTRUCTIONS = {
    "tensor_core": r"[HI]MMA|[HIQ]GMMA|UTC\wMMA",
    "wgmma": r"[HIQ]GMMA|UTC\wMMA",
    "load": r"LDG\b",
    "load_128": r"LDG\.E\S*\.128",
    "store": r"STG\b",
    "store_128": r"STG\.E\S*\.128",
    "async_copy": r"LDGSTS",
    "load_matrix": r"LDSM",
    "load_shared": r"LDS\b",
    "load_shared_128": r"LDS\.\S*128",
    "store_shared": r"STS\b",
    "spill_load": r"LDL",
    "spill_store": r"STL",
    "atomic_global": r"ATOMG?\b|REDG?\b",
    "atomic_shared": r"ATOMS",
    "barrier": r"BAR\b",
    "shuffle": r"SHFL",
    "vote": r"VOTEU?\b|MATCH",
    "fma": r"FFMA|DFMA|HFMA2",
    "division": r"MUFU\.RCP",
    "instructions": r"(?!NOP)",
}
"""Names of instruction counts, each with what its mnemonics begin with."""
FIGURES = (*RESOURCES, *INSTRUCTIONS)

_COMPARE = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}
# An address in a comment, a predicate perhaps, then the mnemonic.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"Function (\S+):\s*\n\s*((?:[A-Z0-9_\[\]]+:\d+\s*)+)")


@functools.cache
def tool(name: str) -> str | None:
    """The path of cuobjdump or nvdisasm, or None: that of the triton wheel first, whose version fits its compiler."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec and spec.origin else None
    return str(bundled) if bundled and bundled.exists() else shutil.which(name)


def why_not() -> str:
    """Why there can be no census on this machine, or ''."""
    return "" if tool("cuobjdump") and tool("nvdisasm") else "no cuobjdump and nvdisasm: pip install triton"


def _run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, input=text)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _dump(option: str, path: Path, arch: str | None) -> str:
    # cuobjdump calls nvdisasm from its own folder or PATH; both tools lie together.
    return _run(str(tool("cuobjdump")), option, *(["-arch", arch] if arch else []), str(path))


def _demangled(names: list[str]) -> list[str]:
    """C++ names without return type and parameters, as written in the source; without c++filt as they are."""
    if not shutil.which("c++filt") or not names:
        return names
    found = _run("c++filt", text="\n".join(names) + "\n").splitlines()
    return [_base_name(name) for name in found]


def _base_name(name: str) -> str:
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):  # the parameters open outside of any template argument
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def census(path: str | Path, arch: str | None = None) -> dict[str, dict[str, int]]:
    """Kernel -> figure -> number, of a .cubin, .o or .so; figures that are zero are there too.

    A file with code for several architectures needs ``arch``, such as "sm_90". Raises ValueError if the file holds no
    kernel for it.
    """
    path = Path(path)
    found: dict[str, dict[str, int]] = {}
    for match in _USAGE.finditer(_dump("-res-usage", path, arch)):
        usage = dict(entry.split(":") for entry in match[2].split())
        found[match[1]] = {figure: int(usage.get(key, 0)) for figure, key in RESOURCES.items()}
    mnemonics: dict[str, Counter[str]] = defaultdict(Counter)
    kernel = ""
    for line in _dump("-sass", path, arch).splitlines():
        if header := re.match(r"\s*Function : (\S+)", line):
            kernel = header[1]
        elif kernel and (match := _INSTRUCTION.match(line)):
            mnemonics[kernel][match[1]] += 1
    for name, counts in mnemonics.items():
        for figure, pattern in INSTRUCTIONS.items():
            number = sum(n for mnemonic, n in counts.items() if re.match(pattern, mnemonic))
            found.setdefault(name, {})[figure] = number
    if not mnemonics:
        raise ValueError(f"{path} holds no machine code for {arch or 'any architecture'}")
    names = [name for name in found if name in mnemonics]
    return dict(zip(_demangled(names), (found[name] for name in names), strict=True))


def architectures(path: Path) -> dict[str, list[str]]:
    """Kinds of code in a library ("elf", "ptx") -> architectures such as "sm_90"."""
    return {
        kind: sorted(set(re.findall(r"\.(sm_\d+\w?)\.", _dump(f"--list-{kind}", path, None))))
        for kind in ("elf", "ptx")
    }


def breaches(
    found: Mapping[str, Mapping[str, int]], budget: Mapping[str, Mapping[str, Mapping[str, str]]], arch: str
) -> list[str]:
    """One sentence for each figure outside its budget; empty if all is well."""
    said = [f"{kernel} has no budget" for kernel in found if kernel not in budget]
    for kernel, parts in budget.items():
        if kernel not in found:
            said.append(f"{kernel} has a budget and was not compiled for {arch}")
            continue
        for figure, rule in {**parts.get("all", {}), **parts.get(arch, {})}.items():
            compare, limit = rule.split()
            number = found[kernel].get(figure)
            if figure not in FIGURES or number is None:
                said.append(f"{kernel}: the budget names an unknown figure {figure!r}")
            elif not _COMPARE[compare](number, int(limit)):
                said.append(f"{kernel} on {arch}: {figure} is {number}, the budget says {rule}")
    return said


def table(found: Mapping[str, Mapping[str, int]], figures: tuple[str, ...] = FIGURES) -> str:
    """The census for reading; figures that are zero everywhere are left out."""
    shown = [f for f in figures if any(row.get(f) for row in found.values())]
    width = max((len(name) for name in found), default=0)
    lines = [" " * width + "".join(f"  {f}" for f in shown)]
    lines += [
        name.ljust(width) + "".join(f"  {row.get(f, 0):{len(f)}}" for f in shown) for name, row in sorted(found.items())
    ]
    return "\n".join(lines)
