"""Everything that a training run changes, and how one step of it changes it."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsekern as sk
from sparsekern import data, models, recipe
from sparsekern.evaluation import count_sparsity, evaluate
from sparsekern.recipe import Recipe
from sparsekern.training_cost import TrainingCost

VERSION = 2
"""Of the state dict."""
_LEARNING_RATES = {"linear": sk.linear_lr, "cosine": sk.cosine_lr, "constant": sk.constant_lr}


class Refused(recipe.RecipeError):
    """The method does not take these settings, or not this network."""


class Run:
    """Everything that training changes, built from a recipe; `state_dict` holds all of it.

    Raises Refused if the method does not take its settings, DataError if the data cannot be had.
    """

    def __init__(self, settings: Recipe, verbose: bool = True):
        self.recipe, self.verbose = settings, verbose
        found = "cuda" if torch.cuda.is_available() else "cpu"
        if settings.device == "cuda" and found == "cpu":
            raise recipe.RecipeError("device: given 'cuda', allowed without a GPU in sight: auto, cpu")
        self.device = torch.device(found if settings.device == "auto" else settings.device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.manual_seed(settings.seed)
        self.data = data.load(settings.data.name, settings.data.train_images).to(self.device)
        channels = self.data.images.shape[1]
        self.model = models.build(settings.model, channels, self.data.classes).to(self.device)
        self.cost = TrainingCost(self.model, self.data.images[:1])
        self.optimizer = self._optimizer()
        self.steps_per_epoch = math.ceil(len(self.data.labels) / settings.batch)
        self.total_steps = self.steps_per_epoch * settings.epochs
        self.choices: dict[str, bool] = {}
        self.layers: list[list[str]] = []
        self.step, self.seconds = 0, 0.0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.rows: list[dict[str, Any]] = []
        self.twin: dict[str, Tensor] | None = None
        # A method for trained networks waits until there is one, and may rewind it to the start.
        trained = sk.METHODS[settings.method.name].start == "trained"
        self.method_step = round(settings.method.pretrain * settings.epochs) * self.steps_per_epoch if trained else 0
        self.initial = _copy(self.model.state_dict()) if trained else None
        self._attach("dense" if self.method_step else settings.method.name)

    def _optimizer(self) -> torch.optim.Optimizer:
        chosen = self.recipe.optimizer
        if chosen.name == "adamw":
            torchs_own = sk.METHODS[self.recipe.method.name].optimizer == "adam"
            kind = torch.optim.AdamW if torchs_own else sk.MaskedAdamW
            return kind(self.model.parameters(), chosen.lr, weight_decay=chosen.weight_decay)
        return sk.MaskedSGD(
            self.model.parameters(), chosen.lr, chosen.momentum,
            weight_decay=chosen.weight_decay, nesterov=chosen.nesterov,
        )  # fmt: skip

    def _attach(self, name: str) -> None:
        """Put the model under that method, for the rest of the run."""
        method, options = self.recipe.method, {}
        if name == method.name:
            options = {**method.options, "pattern": None if method.pattern == "auto" else method.pattern}
            if name == "lottery-ticket":
                options["initial"] = self.initial
        epochs = max(1, (self.total_steps - self.step) // self.steps_per_epoch)
        try:
            sparsifier = sk.build_method(
                name, method.sparsity, epochs=epochs, steps_per_epoch=self.steps_per_epoch,
                include=method.include, exclude=method.exclude, **options,
            )  # fmt: skip
            self.sparsifier = sparsifier.attach(self.model, self.optimizer, self.steps_per_epoch, self.verbose)
        except (TypeError, ValueError) as error:  # a pattern that matches no layer of this network, for one
            raise Refused(f"method: {error}") from error
        if self.recipe.accelerate != "off":
            self._names = {module: name for name, module in self.model.named_modules()}
            sk.nn.accelerate(self.model, self.sparsifier, self._choose)
        self.sparsity = self.count_sparsity()

    def _begin_method(self) -> None:
        self.twin = _copy(self.model.state_dict())
        sk.nn.restore(self.model)
        self.sparsifier.finalize()
        self._attach(self.recipe.method.name)
        if self.step == self.total_steps:  # no training follows that would bring the statistics to the sparse network
            sk.reestimate_batch_norm(self.model, self.data.images[:1024].split(self.recipe.batch))

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
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.data.labels), generator=generator)
        chosen = self._order[1][i * self.recipe.batch : (i + 1) * self.recipe.batch].to(self.device)
        return self.data.images[chosen], self.data.labels[chosen]

    def advance(self) -> None:
        """One optimizer step, with what is due at the end of a phase and of an epoch."""
        start = time.monotonic()
        x, y = self.batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.cost.add_step(self.sparsifier)
        loss = functional.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss_sum += loss.detach() * len(y)
        self.step += 1
        epoch_ends, phase_ends = self.step % self.steps_per_epoch == 0, self._phase_ends()
        if phase_ends and isinstance(self.sparsifier.phase, sk.Dense):
            # The dense network that AC/DC trains along: as it is before the pruning that comes now.
            self.twin = _copy(self.model.state_dict())
        if epoch_ends:
            self.layers = [list(entry) for entry in sk.nn.acceleration_report(self.model).layers]
            self._add_row(start)
        self.sparsifier.step()
        if self.step == self.method_step:
            self._begin_method()
        if epoch_ends or phase_ends:
            self.sparsity = self.count_sparsity()
        self.seconds += time.monotonic() - start

    def _phase_ends(self) -> bool:
        """Whether AC/DC goes from dense to sparse, or back, after this step."""
        if not isinstance(self.sparsifier, sk.ACDC) or self.step >= self.total_steps:
            return False
        return self.sparsifier.schedule.at(self.step) != self.sparsifier.phase

    def _add_row(self, start: float) -> None:
        """Metrics at the end of an epoch, before the next phase begins."""
        found = evaluate(self.model, self.data.validation_images, self.data.validation_labels)
        self.rows.append(
            {
                "epoch": self.step // self.steps_per_epoch, "step": self.step, "phase": self.phase(),
                "lr": self.optimizer.param_groups[0]["lr"], "loss": self.loss_sum.item() / len(self.data.labels),
                "validation_loss": found["loss"], "accuracy": found["accuracy"], "entropy": found["entropy"],
                "sparsity": self.count_sparsity(),
                "seconds": round(self.seconds + time.monotonic() - start, 3),
            }
        )  # fmt: skip
        self.loss_sum.zero_()

    def phase(self) -> str:
        """What the run trains in now: a phase of the method if it has such, else the method's name."""
        waiting = self.step <= self.method_step and self.method_step
        return str(getattr(self.sparsifier, "phase", "dense" if waiting else self.recipe.method.name))

    def count_sparsity(self) -> float:
        """Share of exact zeros among the prunable weights, as the forward pass uses them."""
        return count_sparsity(list(self.sparsifier.forward_weights().values()))

    def note(self) -> str:
        """How the run stands, for the progress bar: epoch, loss, accuracy, phase, sparsity as counted."""
        epoch = min(self.step // self.steps_per_epoch + 1, self.recipe.epochs)
        scores = f"loss {self.rows[-1]['loss']:.4f}, accuracy {self.rows[-1]['accuracy']:.4f}, " if self.rows else ""
        return f"epoch {epoch}/{self.recipe.epochs}, {scores}{self.phase()}, sparsity {self.sparsity:.4f}"

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, and what the run has to tell so far."""
        return {
            "version": VERSION, "recipe": recipe.to_toml(self.recipe), "step": self.step, "seconds": self.seconds,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict(), "twin": self.twin, "rows": self.rows,
            "choices": self.choices, "layers": self.layers, "flops": self.cost.spent,
            "loss_sum": self.loss_sum, "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict` of a run of the same recipe."""
        self.step = state["step"]
        if 0 < self.method_step <= self.step:
            self._begin_method()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sparsifier.load_state_dict(state["sparsifier"])
        self.seconds, self.twin, self.cost.spent = state["seconds"], state["twin"], state["flops"]
        self.rows, self.loss_sum = list(state["rows"]), state["loss_sum"].to(self.device)
        self.choices, self.layers = dict(state["choices"]), list(state["layers"])
        self.sparsity = self.count_sparsity()
        torch.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}
