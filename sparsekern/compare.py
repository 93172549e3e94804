"""Several methods under the same budget: trained side by side, then one table and one plot per sparsity.

    sparsekern compare --data digits --methods acdc,gmp,rigl --sparsity 0.9 0.98 --epochs 20

Every run is a `sparsekern train` run of the same recipe but for the method, its sparsity, the seed and the length: the
same data in the same order, initial weights, optimizer, learning rates and number of steps. They train in processes
of one thread each. The same command again goes on where it was stopped, keeps what is finished, and comes to the same
table. `--method-set str.start=-6` is for one method alone. All files are in runs/NAME: table.md, table.csv,
accuracy-SPARSITY.png, and a folder for each run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sparsekern as sk
from sparsekern import checkpoint, comparison, method_settings, recipe, train, training_run, workers
from sparsekern.recipe import Recipe, RecipeError

DATA = {"digits": "digits", "fashion-mnist": "fashion_mnist"}
"""What --data calls a data set -> its name in recipes, and the recipe that its runs start from."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One run of a comparison."""

    method: str
    sparsity: float | None
    """None for a method to which it means nothing; it then stands beside all of them."""
    length: float
    seed: int
    settings: Recipe

    @property
    def folder(self) -> str:
        parts = [self.method, "" if self.sparsity is None else f"{self.sparsity:g}", f"{self.settings.epochs}epochs"]
        return "-".join(filter(None, [*parts, f"seed{self.seed}"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sparsekern compare`."""
    parser.add_argument("--data", required=True, help=f"one of {', '.join(DATA)}")
    parser.add_argument("--methods", required=True, help=f"names with commas between, of {', '.join(sk.METHODS)}")
    parser.add_argument("--sparsity", required=True, nargs="+", type=float, help="one or more, from 0 to 1")
    parser.add_argument("--epochs", type=int, help="of each run; default: the recipe of the data")
    parser.add_argument("--lengths", nargs="+", type=float, default=[1.0], help="multiples of --epochs (default 1)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="the table shows means over them (default 0)")
    parser.add_argument("--pattern", default="auto", help="of the masks (default: the method's own)")
    parser.add_argument("--train-images", type=int, default=0, help="take so many of the data (default: all)")
    parser.add_argument("--jobs", type=int, default=_cores(), help="processes at a time (default: all cores)")
    parser.add_argument("--name", help="folder below runs/; default: compare-DATA")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="key=value", help="other keys of all recipes"
    )
    parser.add_argument(
        "--method-set", nargs="+", action="extend", default=[], metavar="method.key=value",
        help="for one method alone: an argument (str.start=-6) or its optimizer's (step.optimizer.name=adamw)",
    )  # fmt: skip


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(options: argparse.Namespace) -> int:
    """`sparsekern compare`: 0 when the table is written, 130 when it was stopped, 2 for an error that it explains."""
    try:
        return compare(options)
    except train.EXPLAINED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def compare(options: argparse.Namespace) -> int:
    """Check everything, train what is not finished, write the table and the plots."""
    folder = _folder(options)
    entries = list(plan(options))
    for entry in entries:
        _check_folder(folder / entry.folder, entry.settings)
    refused = refusals(entries)
    _check_own_settings(refused, options.method_set)
    accepted = [entry for entry in entries if entry not in refused]
    todo = {folder / e.folder: e.settings for e in accepted if not (folder / e.folder / "result.json").exists()}
    print(
        f"{len(entries)} runs: {len(refused)} refused, {len(accepted) - len(todo)} finished before, {len(todo)} to go"
    )
    checkpoint.make_folder(folder)
    failed = workers.train_all(
        {path: recipe.to_toml(settings) for path, settings in todo.items()},
        {path: settings.epochs for path, settings in todo.items()},
        options.jobs,
    )
    outcomes = []
    for entry in entries:
        path = folder / entry.folder / "result.json"
        result = json.loads(path.read_text()) if entry not in refused and path.exists() else None
        reason = refused.get(entry) or failed.get(folder / entry.folder, "")
        outcomes.append(
            comparison.Outcome(
                entry.method, entry.sparsity, entry.settings.epochs, result, reason, *_targets(entry, options.sparsity)
            )
        )
    comparison.write(folder, outcomes, options.sparsity, options.method_set)
    return 0


def _check_own_settings(refused: dict[Entry, str], given: list[str]) -> None:
    """Settings that somebody gave to one method must suit it; other refusals are rows of the table."""
    for entry, reason in refused.items():
        own = [text for text in given if text.startswith(f"{entry.method}.")]
        if own:
            raise RecipeError(f"--method-set: given {own}, which {entry.method} refuses: {reason}")


def _targets(entry: Entry, sparsities: list[float]) -> tuple[tuple[float, ...], str]:
    """The sparsities that a run may end with, and why its method may end elsewhere."""
    method, chosen = sk.METHODS[entry.method], entry.settings.method
    if not method.exact:
        return tuple(sparsities), "it finds its own"
    if not method.patterns:
        return (), ""
    if ":" in chosen.pattern or method.patterns == ("n:m",):
        return (chosen.sparsity,), "n:m groups cut short by the end of a row keep as many weights as whole ones"
    special = entry.method == "extended-gmp" or "layer_sparsity" in chosen.options
    return (chosen.sparsity,), "some layers have a sparsity of their own" if special else ""


def _folder(options: argparse.Namespace) -> Path:
    folder = train.run_folder(options.name or f"compare-{options.data}")
    if options.jobs < 1:
        raise RecipeError(f"--jobs: given {options.jobs}, allowed is a whole number of at least 1")
    return folder


def plan(options: argparse.Namespace) -> Iterator[Entry]:
    """All runs of a comparison; RecipeError for anything that is no method, data set, or value of a recipe."""
    if options.data not in DATA:
        raise RecipeError(f"--data: given {options.data!r}, allowed is one of {list(DATA)}")
    methods = [name.strip() for name in options.methods.split(",")]
    for name in methods:
        if name not in sk.METHODS:
            raise RecipeError(f"--methods: given {name!r}, allowed are {list(sk.METHODS)}")
    for label, values in (("--methods", methods), ("--sparsity", options.sparsity), ("--seeds", options.seeds),
                          ("--lengths", options.lengths)):  # fmt: skip
        if len(set(values)) != len(values):
            raise RecipeError(f"{label}: given {values}, allowed is each one once")
    own = method_settings.overrides(options.method_set, methods)
    base = recipe.resolve(DATA[options.data], _overrides(options))
    for method in methods:
        found = sk.METHODS[method].exact and method not in ("dense", "fixed-mask")
        for sparsity in options.sparsity if found else [None]:
            for length in options.lengths:
                for seed in options.seeds:
                    chosen = options.sparsity[0] if sparsity is None else sparsity
                    settings = _settings(base, method, chosen, base.epochs * length, seed, own.get(method, []))
                    yield Entry(method, sparsity, length, seed, settings)


def _overrides(options: argparse.Namespace) -> list[str]:
    """Of the recipe of the data: what the options say, one thread a run, and no measurement, which would differ."""
    given = [*(f"method.sparsity={value!r}" for value in options.sparsity), f"data.train_images={options.train_images}"]
    given += [] if options.epochs is None else [f"epochs={options.epochs}"]
    return [*given, f'method.pattern="{options.pattern}"', "threads=1", "accelerate=off", "measure=false", *options.set]


def _settings(base: Recipe, method: str, sparsity: float, epochs: float, seed: int, own: list[str]) -> Recipe:
    if epochs != int(epochs) or epochs < 1:
        raise RecipeError(f"--lengths: {epochs:g} epochs given, allowed is a whole number of at least 1")
    # Methods that choose no masks take no pattern.
    pattern = base.method.pattern if sk.METHODS[method].patterns else "auto"
    changed = replace(base.method, name=method, sparsity=sparsity, pattern=pattern)
    settings = replace(base, method=changed, epochs=int(epochs), seed=seed)
    return recipe.override(settings, own)


def _check_folder(folder: Path, settings: Recipe) -> None:
    """Nothing may be there but a run of the same recipe."""
    path = folder / "recipe.toml"
    changed = recipe.differences(settings, recipe.resolve(str(path))) if path.exists() else []
    if changed:
        raise RecipeError(
            f"{folder}: holds a run of another recipe (key: given now, stored): {'; '.join(changed)}. Give the same "
            "arguments to go on, or another --name"
        )


def refusals(entries: list[Entry]) -> dict[Entry, str]:
    """Which methods do not take their settings, and why; found by putting the network under each."""
    reasons: dict[Entry, str] = {}
    known: dict[str, str] = {}
    for entry in entries:
        key = f"{entry.method} {entry.sparsity} {entry.length}"
        if key not in known:
            known[key] = _refusal(entry.settings)
        if known[key]:
            reasons[entry] = known[key]
    return reasons


def _refusal(settings: Recipe) -> str:
    # Methods for trained networks come later in a run; here they are tried at once.
    tried: dict[str, Any] = {"method": replace(settings.method, pretrain=0.0)}
    try:
        training_run.Run(replace(settings, **tried), verbose=False).sparsifier.finalize()
    except training_run.Refused as refused:
        return str(refused)
    return ""
