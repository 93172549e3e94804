"""The training program: a recipe in, a folder with metrics, checkpoints, curves and a report out.

    sparsekern train RECIPE [key=value ...] [--name NAME]

A run can be stopped at any step (Ctrl-C, SIGTERM, a crash after the last checkpoint) and the same command goes on. The
result is that of an uninterrupted run, bit for bit on the same machine and number of threads: a checkpoint holds the
weights, momentum, masks, position and random state, and everything else is a function of the recipe and the step.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import sparsekern as sk
from sparsekern import checkpoint, recipe, results, run_report
from sparsekern.data import DataError
from sparsekern.progress import Progress, StopRequest
from sparsekern.recipe import Recipe
from sparsekern.training_run import VERSION, Run


class Stopped(Exception):
    """The run was asked to stop and left a checkpoint."""


class RunError(ValueError):
    """The folder of the run does not fit the command."""


EXPLAINED = (recipe.RecipeError, RunError, DataError, checkpoint.CheckpointError, ModuleNotFoundError)
"""Errors whose message tells a user what to do, without a traceback."""


def run_folder(name: str) -> Path:
    """Where the files of a run or comparison of that name go; RunError if it would lie elsewhere than below runs/."""
    if Path(name).name != name:
        raise RunError(f"--name: given {name!r}, allowed is the name of one folder, which is made below runs/")
    return Path("runs") / name


def stored_state(path: Path, settings: Recipe) -> dict[str, Any] | None:
    """The checkpoint of an unfinished run, or None; an error if it is damaged or belongs to another recipe."""
    if not path.exists():
        return None
    state = checkpoint.load(path)
    if state.get("version") != VERSION:
        raise checkpoint.CheckpointError(path, f"is of version {state.get('version')}, this program reads {VERSION}")
    changed = recipe.differences(settings, recipe.parse(state["recipe"], str(path)))
    changed = [line for line in changed if not line.startswith("measure:")]
    if changed:
        raise RunError(
            f"{path}: an unfinished run of another recipe (key: given now, stored): {'; '.join(changed)}. "
            "Give the same keys to go on, another --name to start beside it, or delete the folder."
        )
    return state


def train(settings: Recipe, folder: Path, overwrite: bool = False, picture: bool = True) -> dict[str, Any]:
    """Train in `folder`, going on from its checkpoint if there is one, and return the results.

    `picture` False leaves out curves.png, which takes a second.

    Raises Stopped after a Ctrl-C, RunError if the folder holds a finished run (unless `overwrite`) or an unfinished
    one of another recipe, CheckpointError if a file cannot be read or written.
    """
    path = folder / "checkpoint.pt"
    state = stored_state(path, settings)
    if state is None and (folder / "result.json").exists() and not overwrite:
        raise RunError(f"{folder}: holds a finished run; give another --name, or --overwrite to replace it")
    run = Run(settings)
    if state is not None:
        run.load_state_dict(state)
        print(f"\nGoing on at step {run.step} of {run.total_steps}, from {path}")
    checkpoint.make_folder(folder)
    if state is None:
        for stale in ("result.json", "report.html", "curves.png", "sparse.pt", "dense.pt", "metrics.jsonl"):
            (folder / stale).unlink(missing_ok=True)
    checkpoint.write_atomically(folder / "recipe.toml", recipe.to_toml(settings).encode())
    print(f"\nTraining on {run.device}, {torch.get_num_threads()} threads; files in {folder}\n", flush=True)
    with StopRequest() as stop, Progress(run.total_steps, run.step) as bar:
        while run.step < run.total_steps:
            run.advance()
            bar.advance(run.note())
            if stop.requested or run.step % run.steps_per_epoch == 0:
                save_progress(run, folder)
            if stop.requested:
                raise Stopped(f"stopped at step {run.step} of {run.total_steps}; the same command goes on from {path}")
    return finish(run, folder, picture)


def save_progress(run: Run, folder: Path) -> None:
    """Checkpoint, then metrics: after a crash in between, the next run writes the metrics again."""
    checkpoint.save(run.state_dict(), folder / "checkpoint.pt")
    lines = "".join(json.dumps(row) + "\n" for row in run.rows)
    checkpoint.write_atomically(folder / "metrics.jsonl", lines.encode())


def finish(run: Run, folder: Path, picture: bool = True) -> dict[str, Any]:
    """Write what a finished run leaves, print its tables, and drop the training checkpoint."""
    result = results.gather(run, folder.name)
    print()
    for table in run_report.tables(result):
        print(f"\n{table.text()}")
    print(f"\n{run_report.acceleration(result)}")
    print(f"Measured on {result['machine']}")
    sk.nn.restore(run.model)
    checkpoint.save(run.sparsifier.finalize().state_dict(), folder / "sparse.pt")
    if run.twin is not None:
        checkpoint.save(run.twin, folder / "dense.pt")
    image = draw(run, result, folder) if picture else None
    checkpoint.write_atomically(folder / "report.html", run_report.page(result, image).encode())
    checkpoint.write_atomically(folder / "result.json", json.dumps(result, indent=1).encode())
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    print(f"\nFiles in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return result


def draw(run: Run, result: dict[str, Any], folder: Path) -> bytes | None:
    """Write curves.png and return it; None, said aloud, without matplotlib."""
    try:
        image = run_report.curves(run.rows, result["phases"])
    except ModuleNotFoundError:
        print("no curves.png: matplotlib is missing, install it with pip install 'sparsekern[train]'", file=sys.stderr)
        return None
    checkpoint.write_atomically(folder / "curves.png", image)
    return image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sparsekern train`."""
    parser.add_argument("recipe", help=f"a TOML file, or one of {', '.join(recipe.shipped())}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as in epochs=40 method.sparsity=0.9")
    parser.add_argument("--name", help="folder of the run below runs/; default: the name of the recipe")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished run of that name")


def run(options: argparse.Namespace) -> int:
    """`sparsekern train`: 0 when the run finished, 130 when it was stopped, 2 for an error that it explains."""
    try:
        settings = recipe.resolve(options.recipe, options.overrides)
        train(settings, run_folder(options.name or Path(options.recipe).stem), options.overwrite)
    except EXPLAINED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    return 0
