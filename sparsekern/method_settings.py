"""`--method-set METHOD.KEY=VALUE`: what one method of a comparison has of its own, as overrides of its recipe.

A budget is the same for all, so KEY is an argument of the method or belongs to the optimizer: epochs, batches, data and
network cannot be changed for one method alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import sparsekern as sk
from sparsekern.recipe import RecipeError

_OF_METHOD = ("pattern", "include", "exclude")
"""Arguments of every class that have a key of their own in recipes."""


def keys(method: str) -> list[str]:
    """What METHOD takes as KEY, beside optimizer.KEY. Sparsity and schedule follow from --sparsity and --epochs."""
    entry, found = sk.METHODS[method], set()
    # A class that passes the rest of its arguments on takes those of its base class too.
    for cls in entry.cls.__mro__:
        parameters = inspect.signature(cls.__init__).parameters.values() if "__init__" in vars(cls) else []
        found |= {p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.name in ("alpha", "backward_sparsity")}
        if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    found -= {"initial"} if entry.start == "trained" else set()  # the run's own first weights
    found |= {"pretrain"} if entry.start == "trained" else set()
    found |= {"rule"} if entry.cls is sk.ACDC else set()
    return sorted(found if entry.patterns else found - {"pattern"})


def overrides(given: Sequence[str], methods: Sequence[str]) -> dict[str, list[str]]:
    """`key=value` overrides of the recipe for each method that has any; RecipeError names what is not allowed."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        method, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            raise RecipeError(f"--method-set: given {text!r}, allowed is METHOD.KEY=VALUE such as str.start=-6")
        if method not in methods:
            raise RecipeError(f"--method-set: given {text!r}, allowed are the methods of this comparison: {methods}")
        if not key.startswith("optimizer."):
            if key not in (allowed := keys(method)):
                raise RecipeError(f"--method-set: given {text!r}, allowed for {method} are {allowed} and optimizer.KEY")
            key = f"method.{key}" if key in (*_OF_METHOD, "pretrain") else f"method.options.{key}"
        found.setdefault(method, []).append(f"{key}={value}")
    return found
