"""Which weights of a model a method prunes, chosen by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from sparsekern.masks import normalise


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight of every convolution and linear layer, under its first name without wrapper prefixes."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            weights[normalise(f"{name}.weight")] = module.weight
    return weights


def prunable_weights(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, Tensor]:
    """Trainable weights of convolutions and linear layers that some `include` and no `exclude` matches (re.search).

    Names carry no wrapper prefix; a weight shared between layers counts once, under its first name; frozen ones
    (requires_grad False) are left as they are. Raises ValueError for a pattern that is no regular expression or matches
    nothing, and if nothing is left.
    """
    weights = {name: w for name, w in layer_weights(model).items() if w.requires_grad and w.is_leaf}
    compiled = {label: check_patterns(label, p) for label, p in (("include", include), ("exclude", exclude))}
    for label, patterns in compiled.items():
        for pattern in patterns:
            if not any(pattern.search(name) for name in weights):
                raise ValueError(f"{label}: {pattern.pattern!r} matches none of the prunable weights {list(weights)}")
    chosen = {
        name: weight
        for name, weight in weights.items()
        if any(p.search(name) for p in compiled["include"]) and not any(p.search(name) for p in compiled["exclude"])
    }
    if not chosen:
        raise ValueError(f"include, exclude: leave nothing of the prunable weights {list(weights)}")
    return chosen


def check_patterns(label: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """The compiled regular expressions; the error for a bad one names the argument `label`."""
    # A lone string is a sequence of its letters, each a pattern of its own.
    if isinstance(patterns, str):
        raise TypeError(f"{label} must be a sequence of regular expressions, got the single string {patterns!r}")
    found = []
    for pattern in patterns:
        try:
            found.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(f"{label}: {pattern!r} is no regular expression: {error}") from None
    return found
