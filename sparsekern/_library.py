"""Registers operators with the dispatcher and loads the compiled kernels where they were built."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_definitions = torch.library.Library("sparsekern", "DEF")
OPS: dict[str, Callable[..., Any]] = {}
"""Name of each operator -> its plain PyTorch reference."""


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `sparsekern::schema`; `reference` serves every device that has no kernel of its own."""
    name = schema[: schema.index("(")]
    _definitions.define(schema)
    _definitions.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsekern::{name}", fake, lib=_definitions)
    OPS[name] = reference
    return getattr(torch.ops.sparsekern, name)


def load_kernels() -> str:
    """Load the operator library; returns '' or the reason why the references are used, which is also warned of once."""
    # The two operators that have no tensor argument, hence no reference.
    _definitions.define("cpu_isa() -> str")
    _definitions.define("set_cpu_isa(str cap) -> ()")
    found = sorted(Path(__file__).parent.glob("_ops*.so"))
    reason = "sparsekern was installed without its compiled kernels; install a C++ compiler and reinstall"
    if found:
        try:
            torch.ops.load_library(str(found[0]))
            torch.ops.sparsekern.cpu_isa()  # an unknown SPARSEKERN_CPU_ISA must fail here, not in the first step
            return ""
        except OSError as error:
            reason = f"{found[0].name} does not load ({error}); reinstall sparsekern against this torch"
    warnings.warn(f"{reason}. The slow PyTorch references are used.", RuntimeWarning, stacklevel=2)
    return reason
