"""Where and on what a benchmark ran: the record that stands beside every number."""

import ctypes
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch

import sparsekern as sk

ROOT = Path(__file__).parents[1]
SOURCES = (".", ":(exclude)benchmarks/results", ":(exclude)README.md")


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of handing it back; elsewhere do nothing.

    Otherwise every large result is new memory, whose page faults cost more than a sparse convolution and hide how fast
    either side computes. PyTorch's tuning guide reaches the same with jemalloc or tcmalloc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_max = -1, -4
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def one_buffer(shapes: list[tuple[int, ...]], layout: str = "contiguous") -> list[torch.Tensor]:
    """Random tensors, 64-byte aligned in one buffer: one by one, most would lie in small pages, as no flat buffer does.

    A tensor of 4 dims is channels_last if `layout` says so.
    """
    sizes = [torch.Size(shape).numel() for shape in shapes]
    rooms = [-(-size // 16) * 16 for size in sizes]
    parts = torch.randn(sum(rooms)).split(rooms)
    found = []
    for shape, size, part in zip(shapes, sizes, parts, strict=True):
        if layout == "channels_last" and len(shape) == 4:
            out, channels, height, width = shape
            found.append(part[:size].view(out, height, width, channels).permute(0, 3, 1, 2))
        else:
            found.append(part[:size].view(shape))
    return found


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    """The commit that is measured, with "-dirty" if tracked sources differ from it; "unknown" outside a checkout."""
    name = _git("rev-parse", "--short=12", "HEAD")
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    return (name or "unknown") + ("-dirty" if dirty else "")


def _cpu() -> str:
    """Model name with family and model number, which tell apart what a cloud calls just "AMD EPYC"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    numbers = f" (family {found['cpu family']} model {found['model']})" if "cpu family" in found else ""
    return found.get("model name", platform.machine()) + numbers


def _compiler() -> str:
    """What built the kernels, as the library itself records it."""
    for library in sorted(Path(sk.__file__).parent.glob("_ops*.so")):
        if found := re.search(rb"GCC: \([^)]*\) [\d.]+|clang version [\d.]+", library.read_bytes()):
            return found[0].decode()
    return "none"


def load() -> float:
    """Runnable processes, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def huge_pages_mib() -> int:
    """How much of this process's memory lies in transparent huge pages now; -1 where the system does not tell."""
    try:
        found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    except OSError:
        return -1
    return int(found[1]) // 1024 if found else -1


def machine() -> dict:
    """The record before a run; `finished` completes it."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
        "commit": commit(),
        "cpu": _cpu(),
        "isa": "none" if sk.degradation else torch.ops.sparsekern.cpu_isa(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "compiler": _compiler(),
        "load_before": load(),
    }


def finished(record: dict) -> dict:
    """The record with what is known only after the run."""
    return {**record, "load_after": load(), "huge_pages_mib": huge_pages_mib()}
