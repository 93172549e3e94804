"""What every sparse training method shares: which weights it prunes, its hooks in the optimizer, when it may act.

A method is a subclass of `Sparsifier` that says when a change is due and what happens then. Nothing here knows AC/DC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.masks import MaskSet, normalise
from sparsekern.methods.attached import claim, release, sparsifier_of
from sparsekern.methods.selection import check_patterns, prunable_weights

# First moments: what the papers call momentum. Second moments survive a reset.
_MOMENTUM_KEYS = ("momentum_buffer", "exp_avg")


class Sparsifier:
    """`attach` once, then `step` last in every iteration, `finalize` at the end.

    Works with any torch optimizer: one with `set_masks` (MaskedSGD) keeps pruned weights and momentum at zero in its
    own kernel, for the others a hook does it after each step. A subclass implements some of the methods under "What a
    method provides" and, if it has more state than its position and masks, `_extra_state` and `_load_extra_state`.

    `schedule` has a `timeline() -> str` and counts optimizer steps, or has `resolve(steps_per_epoch)` that returns such
    a schedule.
    """

    def __init__(self, schedule: Any, *, include: Sequence[str] = (".*",), exclude: Sequence[str] = ()):
        for label, patterns in (("include", include), ("exclude", exclude)):
            check_patterns(label, patterns)  # a bad pattern fails here, not in attach
        self.include, self.exclude, self._schedule = include, exclude, schedule
        self._handles: list[Any] = []

    # What a method provides.
    def _start(self) -> None:
        """Choose the first masks; called in `attach`, before any hook is registered."""

    def _due(self) -> bool:
        """Whether a change is due at `self.position`, the number of steps taken, for `_change` to make in `step`."""
        return False

    def _change(self) -> None:
        """Make the change that is due."""
        raise NotImplementedError

    def needs_dense_gradient(self) -> bool:
        """Whether the step now being taken reads the gradient of pruned weights too; `accelerate` then runs dense."""
        return False

    def masks_are_current(self) -> bool:
        """Whether what `masks` leaves out is surely zero in a forward pass now; if not, `accelerate` runs dense."""
        return bool(self._handles)

    def _before_step(self) -> bool:
        """Called before every step of the optimizer, with all gradients there; True if this replaces the step.

        The optimizer then sees no gradients, and they are back after it.
        """
        return False

    def _after_step(self) -> None:
        """Called after every step of the optimizer, while the gradients are still there."""

    def _extra_state(self) -> dict[str, Any]:
        return {}

    def _load_extra_state(self, state: Mapping[str, Any]) -> Any:
        """Validate and return a function that installs it, so that a bad file changes nothing."""
        return lambda: None

    def _resolve(self, steps_per_epoch: int | None) -> Any:
        """The schedule in optimizer steps."""
        if not hasattr(self._schedule, "resolve"):
            return self._schedule
        if steps_per_epoch is None:
            raise ValueError("steps_per_epoch must be given for a schedule in epochs, got None")
        return self._schedule.resolve(steps_per_epoch)

    def timeline(self) -> str:
        """What will happen when, as `attach` prints it."""
        return self.schedule.timeline()

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int | None = None,
        verbose: bool = True,
    ):
        """Bind to a model and its optimizer; prints the timeline and the prunable layers. Returns itself.

        Raises TypeError for what is no model or optimizer, ValueError if the model is attached already, the optimizer
        has masks of its own, a name pattern matches nothing, or steps_per_epoch is missing for a schedule in epochs.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if self._handles or any(sparsifier_of(p) is not None for p in model.parameters()):
            raise ValueError("model: a sparsifier is attached to it already; call its finalize() first")
        if len(getattr(optimizer, "masks", ())):
            raise ValueError("optimizer: has masks already, and a sparsifier sets its own; build it without masks")
        self.schedule = self._resolve(steps_per_epoch)
        self.masks = MaskSet(prunable_weights(model, self.include, self.exclude))
        self.model, self.optimizer, self.position = model, optimizer, 0
        self._stepped, self._found_inf, self._gradient_seen = False, None, False
        self._fused = hasattr(optimizer, "set_masks")
        self._pruned: dict[str, tuple[Any, Tensor | None]] = {}
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._start()
        if self._due():
            self._change()
        self._register()
        if verbose:
            print(f"{self.timeline()}\n\n{self.layers()}", flush=True)
        return self

    def _register(self) -> None:
        if self._fused:
            self.optimizer.set_masks(self.masks)
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_optimizer_step),
            self.optimizer.register_step_post_hook(self._after_optimizer_step),
            *(self.masks.parameter(n).register_post_accumulate_grad_hook(self._saw_gradient) for n in self.masks),
        ]
        claim(self.model, self)

    def layers(self) -> str:
        """A table of the prunable weights: name, shape, count, live share."""
        rows = [f"{'prunable weight':40} {'shape':>20} {'weights':>12} {'density':>8}"]
        for name in self.masks:
            p = self.masks.parameter(name)
            rows.append(f"{name:40} {'x'.join(map(str, p.shape)):>20} {p.numel():12,} {self.masks.density(name):8.4f}")
        return "\n".join(rows)

    def forward_masks(self) -> MaskSet:
        """Which weights are live in the forward pass now: `masks`, which some methods bring up to date only here."""
        return self.masks

    def forward_weights(self) -> dict[str, Tensor]:
        """The prunable weights as the forward pass uses them now, by name, without gradients."""
        return {name: self.masks.parameter(name).detach() for name in self.masks}

    def step(self) -> None:
        """Advance by one optimizer step and make the change that is due there; call it last in every iteration.

        A change that falls on a step which the gradient scaler skipped waits for the next good one. Raises RuntimeError
        if the optimizer took no step since the last call and the scaler did not skip one either.
        """
        self._check_attached()
        if not self._stepped and not self._skipped_by_scaler():
            raise RuntimeError(
                "sparsifier.step() must be called once after each optimizer.step(), but there was none since the last "
                "call (with gradient accumulation, call both once per accumulated batch)"
            )
        self.position += 1
        if self._due() and self._good_step():
            self._change()
        self._stepped, self._gradient_seen, self._found_inf = False, False, None

    def _check_attached(self) -> None:
        if not self._handles:
            raise RuntimeError("sparsifier is not attached: call attach(model, optimizer) first")

    def _skipped_by_scaler(self) -> bool:
        """Whether GradScaler kept an overflowed step from an optimizer that cannot skip by itself.

        Then there was a backward pass and its gradients are cleared already or not finite; reads the device.
        """
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return self._gradient_seen and (not grads or not all(bool(g.isfinite().all()) for g in grads))

    def _good_step(self) -> bool:
        """Whether the optimizer really moved; reads the device, so it is asked only where a change is due."""
        return self._stepped and (self._found_inf is None or not float(self._found_inf))

    def _saw_gradient(self, parameter: Tensor) -> None:
        self._gradient_seen = True

    def _before_optimizer_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._stepped:
            raise RuntimeError(
                "sparsifier.step() was not called after the last optimizer.step(); it comes last in every iteration"
            )
        if self.needs_dense_gradient() and any(callable(a) for a in (*args, kwargs.get("closure"))):
            raise RuntimeError(
                f"optimizer.step() must be called without a closure for {type(self).__name__}, which reads the "
                "gradients before the step"
            )
        if self._before_step():
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self._withheld = [(p, p.grad) for p in parameters if p.grad is not None]
            for parameter, _ in self._withheld:
                parameter.grad = None

    def _overflowed(self) -> bool:
        """Whether GradScaler found an overflow in the gradients of the step about to be taken; reads the device."""
        found = getattr(self.optimizer, "found_inf", None)
        return found is not None and bool(float(found))

    def _after_optimizer_step(self, *_: Any) -> None:
        for parameter, gradient in self._withheld:
            parameter.grad = gradient
        self._withheld = []
        self._stepped = True
        # GradScaler takes it away again right after the step.
        self._found_inf = getattr(self.optimizer, "found_inf", None)
        if not self._fused:
            self._hold_zero()
        self._after_step()

    def momentum(self, parameter: Tensor) -> list[Tensor]:
        """The first-moment buffers that the optimizer holds for a parameter."""
        state = self.optimizer.state.get(parameter, {})
        return [state[key] for key in _MOMENTUM_KEYS if state.get(key) is not None]

    @torch.no_grad()
    def _hold_zero(self) -> None:
        """Pruned weights and, unless the optimizer lets it decay, their momentum become exactly zero."""
        for name in self.masks:
            pruned = self._pruned_of(name)
            if pruned is None:
                continue
            parameter = self.masks.parameter(name)
            parameter.masked_fill_(pruned, 0)
            if getattr(self.optimizer, "momentum_policy", "mask") == "mask":
                for buffer in self.momentum(parameter):
                    buffer.masked_fill_(pruned, 0)
        if self._fused:  # needed at phase edges only, not worth a byte per weight in between
            self._pruned.clear()

    def _pruned_of(self, name: str) -> Tensor | None:
        """True where that weight is pruned, unpacked once per mask; None if nothing is."""
        parameter = self.masks.parameter(name)
        key = self.masks.version(name), parameter.stride(), parameter.device
        if self._pruned.get(name, (None,))[0] != key:
            pruned = ~self.masks.bool(name)
            self._pruned[name] = key, pruned if bool(pruned.any()) else None
        return self._pruned[name][1]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on exactly, at any point of the iteration, also with a change waiting."""
        self._check_attached()
        stepped = "good" if self._good_step() else "skipped" if self._stepped or self._skipped_by_scaler() else "no"
        return {
            "position": self.position, "stepped": stepped, "masks": self.masks.state_dict(), **self._extra_state()
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict` into an attached sparsifier; ValueError, before anything changes, if it does not fit."""
        self._check_attached()
        expected = {"position", "stepped", "masks", *self._extra_state()}
        if set(state) != expected:
            raise ValueError(f"state must hold {sorted(expected)}, got {sorted(map(str, state))}")
        position, stepped = state["position"], state["stepped"]
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ValueError(f"state['position'] must be a whole number of steps, got {position!r}")
        if stepped not in ("no", "good", "skipped"):
            raise ValueError(f"state['stepped'] must be 'no', 'good' or 'skipped', got {stepped!r}")
        install = self._load_extra_state(state)
        self.masks.load_state_dict(state["masks"])
        install()
        self.position, self._stepped = position, stepped != "no"
        self._found_inf = torch.ones(()) if stepped == "skipped" else None

    def effective(self, name: str, weight: Tensor) -> Tensor:
        """The value that counts of `weight`, which is that of `name` or a copy of it: zero where pruned."""
        return weight.masked_fill(~self.masks.bool(name).to(weight.device), 0)

    @torch.no_grad()
    def sparse_state_dict(self, model: nn.Module | None = None) -> dict[str, Any]:
        """The state dict of the model, or of a copy of it such as an average of weights, with pruned weights zero.

        Nothing is changed. An average over steps with other masks is nonzero at pruned places until it loads this.
        """
        self._check_attached()
        parameters = self.model.named_parameters(remove_duplicate=False)
        names = {normalise(key): self.masks.name_of(parameter) for key, parameter in parameters}
        state = (self.model if model is None else model).state_dict()
        for key, value in state.items():
            if (name := names.get(normalise(key))) is not None:
                state[key] = self.effective(name, value).detach().clone()
        return state

    def finalize(self) -> nn.Module:
        """Detach from model and optimizer. The model is plain, with its zeros in place; returned for convenience."""
        self._check_attached()
        self._hold_zero()
        if self._fused:
            self.optimizer.set_masks({})
        for handle in self._handles:
            handle.remove()
        self._handles, self._pruned = [], {}
        release(self.model)
        return self.model
