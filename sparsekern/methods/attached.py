"""Which sparsifier a parameter is under; a wrapper or a part of an attached model holds the same parameters."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from sparsekern.methods.base import Sparsifier

_attached = WeakTensorKeyDictionary()


def claim(model: nn.Module, sparsifier: Sparsifier) -> None:
    """Note that all parameters of `model` are under `sparsifier`."""
    for parameter in model.parameters():
        _attached[parameter] = weakref.ref(sparsifier)


def release(model: nn.Module) -> None:
    """Undo `claim`."""
    for parameter in model.parameters():
        _attached.pop(parameter, None)


def sparsifier_of(parameter: Tensor) -> Sparsifier | None:
    """The sparsifier attached to a model that holds `parameter`, None without one."""
    found = _attached.get(parameter)
    return None if found is None else found()
