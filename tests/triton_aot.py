"""Compiles the Triton kernels without a GPU, exactly as the operators would launch them, for a census of machine code.

Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import census
import torch

MODULES = ("masked_adamw", "masked_sgd", "topk_mask", "gather")
SPECIAL = ("num_warps", "num_stages", "enable_fp_fusion")
POINTERS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip


class Recorder:
    """Stands in for the launcher: notes what would run and runs nothing."""

    def __init__(self, monkeypatch: Any):
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        for name in MODULES:
            monkeypatch.setattr(importlib.import_module(f"sparsekern.triton.{name}"), "wrapped", self._wrapped)

    def _wrapped(self, kernel: Any) -> Any:
        return _Grid(lambda *args, **kwargs: self.launches.append((kernel, args, kwargs)))

    def of(self, call: Callable[[], Any]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """What ``call`` launches, one entry per kernel."""
        self.launches.clear()
        call()
        return list({launch[0].__name__: launch for launch in self.launches}.values())


class _Grid:
    def __init__(self, launch: Callable[..., None]):
        self.launch = launch

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch


def compiled(launch: tuple[Any, tuple[Any, ...], dict[str, Any]], arch: int) -> dict[str, int]:
    """The census of one kernel for sm_``arch``, specialised to its arguments as Triton does at a launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, args, kwargs = launch
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value, free = given[parameter.name], parameter.do_not_specialize
        if parameter.is_constexpr or (type(value) is int and value == 1 and not free):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (value % 16 == 0 and not free):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: kwargs[name] for name in SPECIAL if name in kwargs}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(built.asm["cubin"])
        (row,) = census.census(path).values()
    return row
