"""The training program: a recipe in, a folder with metrics, checkpoints, curves and a report out.

    sparsekern train RECIPE [key=value ...] [--name NAME]

A run can be stopped at any step (Ctrl-C, SIGTERM, a crash after the last checkpoint) and the same command goes on. The
result is that of an uninterrupted run, bit for bit on the same machine and number of threads: a checkpoint holds the
weights, momentum, masks, position and random state, and everything else is a function of the recipe and the step.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsekern as sk
from sparsekern import checkpoint, data, models, recipe, results, run_report
from sparsekern.evaluation import count_sparsity, evaluate
from sparsekern.progress import Progress, StopRequest
from sparsekern.recipe import Recipe

_LEARNING_RATES = {"linear": sk.linear_lr, "cosine": sk.cosine_lr, "constant": sk.constant_lr}
_VERSION = 1


class Stopped(Exception):
    """The run was asked to stop and left a checkpoint."""


class RunError(ValueError):
    """The folder of the run does not fit the command."""


class Run:
    """Everything that training changes, built from a recipe; `state_dict` holds all of it."""

    def __init__(self, settings: Recipe):
        self.recipe = settings
        found = "cuda" if torch.cuda.is_available() else "cpu"
        if settings.device == "cuda" and found == "cpu":
            raise recipe.RecipeError("device: given 'cuda', allowed without a GPU in sight: auto, cpu")
        self.device = torch.device(found if settings.device == "auto" else settings.device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.data = data.load(settings.data.name).to(self.device)
        channels = self.data.images.shape[1]
        self.model = models.build(settings.model, channels, self.data.classes).to(self.device)
        chosen = settings.optimizer
        self.optimizer = sk.MaskedSGD(
            self.model.parameters(), chosen.lr, chosen.momentum,
            weight_decay=chosen.weight_decay, nesterov=chosen.nesterov,
        )  # fmt: skip
        self.steps_per_epoch = math.ceil(len(self.data.labels) / settings.batch)
        self.total_steps = self.steps_per_epoch * settings.epochs
        method = settings.method
        try:
            self.sparsifier = sk.ACDC(
                method.sparsity, sk.acdc_schedule(settings.epochs, rule=method.rule), pattern=method.pattern,
                distribution=method.distribution, include=method.include, exclude=method.exclude, reset=method.reset,
            ).attach(self.model, self.optimizer, self.steps_per_epoch)  # fmt: skip
        except ValueError as error:  # a pattern that matches no layer of this network, for one
            raise recipe.RecipeError(f"method: {error}") from error
        self.choices: dict[str, bool] = {}
        self.layers: list[list[str]] = []
        if settings.accelerate != "off":
            self._names = {module: name for name, module in self.model.named_modules()}
            sk.nn.accelerate(self.model, self.sparsifier, self._choose)
        self.step, self.seconds = 0, 0.0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.sparsity = self.count_sparsity()
        self.rows: list[dict[str, Any]] = []
        self.twin: dict[str, Tensor] | None = None

    def _choose(self, layer: nn.Module, structure: sk.ops.SparseStructure, input: Tensor) -> bool:
        """Whether a layer runs on the sparse kernels. Measured once: a resumed run must compute as it did before."""
        if self.recipe.accelerate == "always":
            return True
        key = f"{self._names[layer]}, 2^{input.numel().bit_length()}, {torch.is_grad_enabled()}"
        if key not in self.choices:
            self.choices[key] = sk.nn.measured_choice(layer, structure, input)
        return self.choices[key]

    def learning_rate(self) -> float:
        """Of the step to come."""
        chosen = self.recipe.optimizer
        warmup = chosen.warmup_epochs * self.steps_per_epoch
        multiplier = _LEARNING_RATES[chosen.schedule](self.step, total_steps=self.total_steps, warmup_steps=warmup)
        return chosen.lr * multiplier

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the step to come; the order is a function of seed and epoch."""
        epoch, i = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.data.labels), generator=generator)
        chosen = order.split(self.recipe.batch)[i].to(self.device)
        return self.data.images[chosen], self.data.labels[chosen]

    def advance(self) -> None:
        """One optimizer step, with what is due at the end of a phase and of an epoch."""
        start = time.monotonic()
        x, y = self.batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = functional.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach() * len(y)
        self.step += 1
        phase, epoch_ends = self.sparsifier.phase, self.step % self.steps_per_epoch == 0
        phase_ends = self.step < self.total_steps and self.sparsifier.schedule.at(self.step) != phase
        if phase_ends and isinstance(phase, sk.Dense):
            # The dense network that AC/DC trains along: as it is before the pruning that comes now.
            self.twin = {name: value.clone() for name, value in self.model.state_dict().items()}
        if epoch_ends:
            self.layers = [list(entry) for entry in sk.nn.acceleration_report(self.model).layers]
            self._add_row(start)
        self.sparsifier.step()
        if epoch_ends or phase_ends:
            self.sparsity = self.count_sparsity()
        self.seconds += time.monotonic() - start

    def _add_row(self, start: float) -> None:
        """Metrics at the end of an epoch, before the next phase begins."""
        found = evaluate(self.model, self.data.validation_images, self.data.validation_labels)
        self.rows.append(
            {
                "epoch": self.step // self.steps_per_epoch, "step": self.step, "phase": str(self.sparsifier.phase),
                "lr": self.optimizer.param_groups[0]["lr"], "loss": self.loss_sum.item() / len(self.data.labels),
                "validation_loss": found["loss"], "accuracy": found["accuracy"], "entropy": found["entropy"],
                "sparsity": self.count_sparsity(),
                "seconds": round(self.seconds + time.monotonic() - start, 3),
            }
        )  # fmt: skip
        self.loss_sum.zero_()

    def count_sparsity(self) -> float:
        """Share of exact zeros among the prunable weights."""
        return count_sparsity([self.sparsifier.masks.parameter(name) for name in self.sparsifier.masks])

    def note(self) -> str:
        """How the run stands, for the progress bar: epoch, loss, accuracy, phase, sparsity as counted."""
        epoch = min(self.step // self.steps_per_epoch + 1, self.recipe.epochs)
        scores = f"loss {self.rows[-1]['loss']:.4f}, accuracy {self.rows[-1]['accuracy']:.4f}, " if self.rows else ""
        phase = "dense" if isinstance(self.sparsifier.phase, sk.Dense) else "sparse"
        return f"epoch {epoch}/{self.recipe.epochs}, {scores}{phase} phase, sparsity {self.sparsity:.4f}"

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, and what the run has to tell so far."""
        return {
            "version": _VERSION, "recipe": recipe.to_toml(self.recipe), "step": self.step, "seconds": self.seconds,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(), "twin": self.twin, "rows": self.rows,
            "choices": self.choices, "layers": self.layers,
            "loss_sum": self.loss_sum, "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` of a run of the same recipe."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])
        self.step, self.seconds, self.twin = state["step"], state["seconds"], state["twin"]
        self.rows, self.loss_sum = list(state["rows"]), state["loss_sum"].to(self.device)
        self.choices, self.layers = dict(state["choices"]), list(state["layers"])
        self.sparsity = self.count_sparsity()
        torch.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)


def stored_state(path: Path, settings: Recipe) -> dict[str, Any] | None:
    """The checkpoint of an unfinished run, or None; an error if it is damaged or belongs to another recipe."""
    if not path.exists():
        return None
    state = checkpoint.load(path)
    if state.get("version") != _VERSION:
        raise checkpoint.CheckpointError(path, f"is of version {state.get('version')}, this program reads {_VERSION}")
    changed = recipe.differences(settings, recipe.parse(state["recipe"], str(path)))
    changed = [line for line in changed if not line.startswith("measure:")]
    if changed:
        raise RunError(
            f"{path}: an unfinished run of another recipe (key: given now, stored): {'; '.join(changed)}. "
            "Give the same keys to go on, another --name to start beside it, or delete the folder."
        )
    return state


def train(settings: Recipe, folder: Path, overwrite: bool = False) -> dict[str, Any]:
    """Train in `folder`, going on from its checkpoint if there is one, and return the results.

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
    return finish(run, folder)


def save_progress(run: Run, folder: Path) -> None:
    """Checkpoint, then metrics: after a crash in between, the next run writes the metrics again."""
    checkpoint.save(run.state_dict(), folder / "checkpoint.pt")
    lines = "".join(json.dumps(row) + "\n" for row in run.rows)
    checkpoint.write_atomically(folder / "metrics.jsonl", lines.encode())


def finish(run: Run, folder: Path) -> dict[str, Any]:
    """Write what a finished run leaves, print its tables, and drop the training checkpoint."""
    result = results.gather(run, folder.name)
    print()
    for table in run_report.tables(result):
        print(f"\n{table.text()}")
    print(f"\n{run_report.acceleration(result)}")
    print(f"Measured on {result['machine']}")
    sk.nn.restore(run.model)
    checkpoint.save(run.sparsifier.finalize().state_dict(), folder / "sparse.pt")
    checkpoint.save(run.twin, folder / "dense.pt")
    try:
        picture = run_report.curves(run.rows, result["phases"])
        checkpoint.write_atomically(folder / "curves.png", picture)
    except ModuleNotFoundError:
        picture = None
        print("no curves.png: matplotlib is missing, install it with pip install 'sparsekern[train]'", file=sys.stderr)
    checkpoint.write_atomically(folder / "report.html", run_report.page(result, picture).encode())
    checkpoint.write_atomically(folder / "result.json", json.dumps(result, indent=1).encode())
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    print(f"\nFiles in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return result


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
        name = options.name or Path(options.recipe).stem
        if Path(name).name != name:
            raise RunError(f"--name: given {name!r}, allowed is the name of one folder, which is made below runs/")
        train(settings, Path("runs") / name, options.overwrite)
    except (recipe.RecipeError, RunError, checkpoint.CheckpointError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    return 0
