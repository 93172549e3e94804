"""The hooks by which the layers of a model compute with effective weights; `effective.py` says how that works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sparsekern.methods.effective import EffectiveSparsifier


# Older versions of torch.compile break the graph where something leaves the dictionary of a module (2.10 does).
_TRACES_POP = torch.__version__ >= (2, 14)


class _Hooks:
    """A copied model shares them, so it runs sparse as the original does."""

    def __init__(self, sparsifier: EffectiveSparsifier):
        self.sparsifier = sparsifier

    def register(self, module: nn.Module, prepend: bool) -> list[Any]:
        return [
            module.register_forward_pre_hook(self.enter, prepend=prepend),
            module.register_forward_hook(self.leave, prepend=True, always_call=True),
        ]

    def enter(self, module: nn.Module, *_: Any) -> None:
        raise NotImplementedError

    def leave(self, module: nn.Module, *_: Any) -> None:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hooks:
        return self

    def __reduce__(self):
        raise TypeError(
            "model: cannot be pickled while a sparsifier is attached that computes its forward weights; save its "
            "state_dict() and the sparsifier's, or call finalize() first"
        )


class Swap(_Hooks):
    """The two hooks of one weight of one layer."""

    def __init__(self, sparsifier: EffectiveSparsifier, name: str, key: str):
        super().__init__(sparsifier)
        self.name, self.key = name, key

    def enter(self, module: nn.Module, _: Any) -> None:
        weight = module._parameters[self.key]
        # In a compiled model the formula becomes part of the graph.
        compute = self.sparsifier.effective if torch.compiler.is_compiling() else self.sparsifier.shadow
        # The instance dictionary comes before nn.Module's look-up of parameters and is no part of the state dict.
        module.__dict__[self.key] = compute(self.name, weight)

    def leave(self, module: nn.Module, *_: Any) -> None:
        if torch.compiler.is_compiling() and not _TRACES_POP:
            module.__dict__[self.key] = module._parameters[self.key]  # as if nothing shadowed it
        else:
            module.__dict__.pop(self.key, None)


class WholePass(_Hooks):
    """The two hooks of the whole model."""

    def enter(self, module: nn.Module, *_: Any) -> None:
        if module is self.sparsifier.model and not torch.compiler.is_compiling():
            self.sparsifier.begin_pass()

    def leave(self, module: nn.Module, *_: Any) -> None:
        if module is self.sparsifier.model and not torch.compiler.is_compiling():
            self.sparsifier.end_pass()
