"""Recipes: everything that decides a training run, as dataclasses, as TOML, and as `key=value` on the command line.

A recipe is a value: `resolve` makes it from a TOML file and overrides, `to_toml` writes it down in full beside the
results. Unknown keys, wrong types and values out of range are errors that name the key, what was given and what is
allowed; numbers are never converted, except whole numbers where a fraction is allowed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from sparsekern.methods.registry import BLOCKS, METHODS


class RecipeError(ValueError):
    """A recipe or an override is not valid; the message names the key, what was given and what is allowed."""


def _setting(default: Any, *, least: float = -math.inf, most: float = math.inf, choices: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"least": least, "most": most, "choices": tuple(choices)})


@dataclass(frozen=True)
class Data:
    """The data set, by its name in `sparsekern.data`; `train_images` takes that many of it, 0 all."""

    name: str = _setting("digits", choices=("digits", "fashion_mnist"))
    train_images: int = _setting(0, least=0)


@dataclass(frozen=True)
class Model:
    """The network, by its name in `sparsekern.models`: channels of its first stage, stride of its first layer."""

    name: str = _setting("residual", choices=("residual",))
    width: int = _setting(32, least=1, most=4096)
    stride: int = _setting(1, least=1, most=4)


@dataclass(frozen=True)
class Optimizer:
    """Masked SGD, or torch's AdamW ("adamw": no `momentum`, no `nesterov`), and the learning rate.

    That is `warmup_epochs` of linear warm-up, then `schedule` down to the last step.
    """

    name: str = _setting("sgd", choices=("sgd", "adamw"))
    lr: float = _setting(0.1, least=0)
    momentum: float = _setting(0.9, least=0, most=1)
    weight_decay: float = _setting(1e-4, least=0)
    nesterov: bool = _setting(False)
    schedule: str = _setting("linear", choices=("linear", "cosine", "constant"))
    warmup_epochs: int = _setting(2, least=0)


@dataclass(frozen=True)
class Method:
    """What prunes: a name in `sparsekern.METHODS` and the arguments of `sparsekern.build_method`.

    `pattern` "auto" leaves it to the method. `options` are further arguments of the method's class, and `rule` of
    AC/DC's schedule. A method for trained networks is attached after the share `pretrain` of the epochs.
    """

    name: str = _setting("acdc", choices=tuple(METHODS))
    sparsity: float = _setting(0.95, least=0, most=1)
    pattern: str = _setting("auto", choices=("auto", *BLOCKS, "1:2", "1:4", "2:4", "4:8"))
    pretrain: float = _setting(0.5, least=0, most=1)
    include: tuple[str, ...] = _setting((".*",))
    exclude: tuple[str, ...] = _setting(())
    options: dict[str, Any] = field(default_factory=dict, metadata={"least": 0, "most": 0, "choices": ()})


@dataclass(frozen=True)
class Recipe:
    """One training run.

    `threads` is part of it because sums depend on it: 0 takes torch's own number, and results then vary with the
    machine. `accelerate`: run layers on the sparse kernels in sparse phases where a measurement favours it, always or
    never. `measure`: time the kernels against their baselines at the end, on the trained network.
    """

    seed: int = _setting(0, least=0, most=2**31 - 1)
    epochs: int = _setting(20, least=1)
    batch: int = _setting(64, least=2)
    device: str = _setting("auto", choices=("auto", "cpu", "cuda"))
    threads: int = _setting(0, least=0, most=1024)
    accelerate: str = _setting("measured", choices=("measured", "always", "off"))
    measure: bool = _setting(True)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    method: Method = field(default_factory=Method)


def shipped() -> dict[str, Path]:
    """The recipes inside the package, by name."""
    folder = Path(str(resources.files("sparsekern"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def resolve(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name in the package, or in the file of that path, changed by `key=value` overrides."""
    path = shipped().get(source, Path(source))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        allowed = f"allowed are a readable TOML file or one of {list(shipped())}"
        raise RecipeError(f"recipe: given {source!r}, which cannot be read ({error}); {allowed}") from error
    tables = _parse_tables(text, str(path))
    for override in overrides:
        _override(tables, override)
    return from_dict(tables)


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe changed by `key=value` overrides, and checked anew."""
    tables = _parse_tables(to_toml(recipe), "recipe")
    for text in overrides:
        _override(tables, text)
    return from_dict(tables)


def parse(text: str, source: str = "recipe") -> Recipe:
    """A recipe from TOML text; `source` is what errors call it."""
    return from_dict(_parse_tables(text, source))


def from_dict(tables: Mapping[str, Any]) -> Recipe:
    """A recipe from nested mappings, as TOML gives them; keys left out keep their defaults."""
    recipe = _build(Recipe, tables, "")
    if recipe.optimizer.warmup_epochs > recipe.epochs:
        raise RecipeError(
            f"optimizer.warmup_epochs: given {recipe.optimizer.warmup_epochs}, "
            f"allowed is a whole number from 0 to epochs = {recipe.epochs}"
        )
    return recipe


def to_toml(recipe: Recipe) -> str:
    """All keys of a recipe, defaults included; `resolve` of it gives an equal recipe."""
    lines, tables = [], []
    for entry in dataclasses.fields(recipe):
        value = getattr(recipe, entry.name)
        if dataclasses.is_dataclass(value):
            tables += ["", f"[{entry.name}]"]
            tables += [f"{key} = {_toml_value(item)}" for key, item in dataclasses.asdict(value).items()]
        else:
            lines.append(f"{entry.name} = {_toml_value(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def differences(given: Recipe, other: Recipe) -> list[str]:
    """One line for each key in which two recipes differ: 'key: this, that'."""
    ours, theirs = (_flatten(dataclasses.asdict(recipe)) for recipe in (given, other))
    keys = {**ours, **theirs}
    return [f"{key}: {ours.get(key)!r}, {theirs.get(key)!r}" for key in keys if ours.get(key) != theirs.get(key)]


def _flatten(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _parse_tables(text: str, source: str) -> dict[str, Any]:
    toml = _toml()
    try:
        return toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise RecipeError(f"{source}: is not valid TOML: {error}") from error


def _toml() -> types.ModuleType:
    """The standard library's reader, or its backport on Python 3.10."""
    try:
        import tomllib
    except ModuleNotFoundError:
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            raise RecipeError("Python 3.10 reads recipes with tomli: pip install 'sparsekern[train]'") from error
    return tomllib


def _override(tables: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError(f"override: given {override!r}, allowed is key=value such as method.sparsity=0.9")
    *parents, last = key.split(".")
    table = tables
    for depth, parent in enumerate(parents, start=1):
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{key}: unknown key; {'.'.join(parents[:depth])} is a value and has no keys")
    table[last] = _override_value(text.strip())


def _override_value(text: str) -> Any:
    """A TOML value; what is none is a string, so that quotes may be left out."""
    toml = _toml()
    try:
        found = toml.loads(f"value = {text}")
    except toml.TOMLDecodeError:
        return text
    return found["value"] if found.keys() == {"value"} else text


def _build(kind: type, table: Any, prefix: str) -> Any:
    if not isinstance(table, Mapping):
        raise RecipeError(f"{prefix.rstrip('.')}: given {table!r}, allowed is a table of {_keys(kind)}")
    for key in table:
        if key not in _keys(kind):
            raise RecipeError(f"{prefix}{key}: unknown key, given {table[key]!r}; allowed here are {_keys(kind)}")
    hints = get_type_hints(kind)
    values = {}
    for entry in dataclasses.fields(kind):
        if entry.name in table:
            name, value, hint = prefix + entry.name, table[entry.name], hints[entry.name]
            nested = dataclasses.is_dataclass(hint)
            values[entry.name] = _build(hint, value, name + ".") if nested else _checked(name, value, hint, entry)
    return kind(**values)


def _keys(kind: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(kind)]


def _checked(name: str, value: Any, hint: Any, entry: dataclasses.Field) -> Any:
    least, most, choices = (entry.metadata[key] for key in ("least", "most", "choices"))
    if hint == tuple[str, ...]:
        good = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
        value, allowed = tuple(value) if good else value, "a list of strings"
    elif hint == dict[str, Any]:
        good, allowed = isinstance(value, Mapping), "a table of the method's own arguments"
    elif hint is bool:
        good, allowed = isinstance(value, bool), "true or false"
    elif hint is str:
        good, allowed = isinstance(value, str) and value in choices, f"one of {list(choices)}"
    else:
        numbers = (int,) if hint is int else (int, float)
        good = isinstance(value, numbers) and not isinstance(value, bool) and least <= value <= most
        good = good and math.isfinite(value)
        value = hint(value) if good else value
        allowed = f"a {'whole' if hint is int else 'finite'} number{_range(least, most)}"
    if not good:
        raise RecipeError(f"{name}: given {value!r} ({type(value).__name__}), allowed is {allowed}")
    return value


def _range(least: float, most: float) -> str:
    low = "" if least == -math.inf else f" from {least:g}" if most < math.inf else f" of at least {least:g}"
    return low + ("" if most == math.inf else f" to {most:.10g}")


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    # JSON strings are TOML strings, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)
