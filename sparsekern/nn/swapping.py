"""A module takes another class and gives it back; it stays the same object with the same parameters and hooks."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

STATE = "_sparsekern_layer"
"""Attribute of a swapped module for what it knows beyond what it was before. One that was made by calling the class of
another has none, and does what its plain class does."""


class Swapped:
    """Mixed into the class of a module. Its copies and pickles are plain modules, so files need no sparsekern."""

    _sparsekern_plain: type[nn.Module]

    def __reduce_ex__(self, protocol: int):
        state = {key: value for key, value in self.__dict__.items() if key != STATE}
        # Not copyreg.__newobj__, which pickle accepts for the object's own class only.
        return object.__new__, (self._sparsekern_plain,), state


@cache
def _mixed(mixin: type[Swapped], plain: type[nn.Module]) -> type[nn.Module]:
    # The same name, because repr(model) shows it.
    names = {"__module__": __name__, "__doc__": plain.__doc__, "_sparsekern_plain": plain}
    return type(plain.__name__, (mixin, plain), names)


def swap(module: nn.Module, mixin: type[Swapped], state: Any = None) -> None:
    """Mix ``mixin`` into the class of ``module``, which keeps ``state``."""
    module.__class__ = _mixed(mixin, type(module))
    if state is not None:
        setattr(module, STATE, state)


def states(model: nn.Module, mixin: type[Swapped]) -> list[Any]:
    """What the modules of ``model`` know that ``mixin`` was mixed into."""
    return [vars(module)[STATE] for module in model.modules() if isinstance(module, mixin) and STATE in vars(module)]


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`; does nothing to a model that is not accelerated. Returns `model`."""
    for module in model.modules():
        if isinstance(module, Swapped):
            module.__class__ = module._sparsekern_plain
            vars(module).pop(STATE, None)
    return model
