"""Which operators ran a structure as a dense operator on a GPU, and why: a warning says so once, a report each time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_noted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def note(structure: Sequence[Tensor], operator: str, reason: str) -> None:
    """Operator ``operator`` did not run this structure sparse."""
    _noted.setdefault(structure[1], {})[operator] = reason


def noted(structure: Sequence[Tensor]) -> dict[str, str]:
    """Operator -> reason, since `forget`."""
    return _noted.get(structure[1], {})


def forget(structure: Sequence[Tensor]) -> None:
    """A new pass begins."""
    _noted.pop(structure[1], None)
