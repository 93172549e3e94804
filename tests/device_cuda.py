"""The operators on a real GPU in place of those for CPU tensors: operands are moved there and results back.

So that the same tests run on it that run on the CPU and emulated.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sparsekern import _library
from sparsekern.ops import sparse_calls


def moved(target: torch._ops.OpOverload, move: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """`target` on what `move` makes of the operands; what it writes is written back."""
    written = [argument.alias_info is not None for argument in target._schema.arguments]

    def call(*arguments: Any, **options: Any) -> Any:
        names = [argument.name for argument in target._schema.arguments]
        given = dict(zip(names, arguments, strict=False)) | options
        there: dict[int, tuple[Tensor, Tensor]] = {}

        def send(t: Tensor) -> Tensor:
            return there.setdefault(id(t), (t, move(t)))[1]

        sent = tree_map_only(Tensor, send, given)
        result = target(**sent)
        for name, is_written in zip(names, written, strict=True):
            if is_written and name in given:
                tree_map_only(Tensor, lambda t: t.copy_(there[id(t)][1]), given[name])
        return tree_map_only(Tensor, lambda t: t.cpu(), result)

    return call


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Serves CPU tensors by the GPU."""
    library = torch.library.Library("sparsekern", "IMPL")
    direct = sparse_calls.repeat, sparse_calls.remember
    sparse_calls.repeat = sparse_calls.remember = lambda *arguments: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the override, which is meant
        for name in _library.OPS:
            target = getattr(torch.ops.sparsekern, name).default
            library.impl(name, moved(target, lambda t: t.cuda()), "CPU")
    try:
        yield
    finally:
        sparse_calls.repeat, sparse_calls.remember = direct
        library._destroy()
