"""Sparse or dense, decided by running both once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekern.nn.layers import run_dense, run_sparse
from sparsekern.ops import SparseStructure

# Of two operators about as fast, the best of a few runs picks either; sparse must be faster by more than that.
_GAIN = 0.1
# Rounds are added until the two fastest runs of each operator agree to this share.
_ROUNDS, _MOST_ROUNDS, _AGREE = 3, 9, 0.1


@dataclass(frozen=True)
class Speeds:
    """Seconds of one pass of a layer, forward and the gradients that it needs; true if sparse saves 10% or more."""

    sparse: float
    dense: float
    predicted: bool = False
    """Whether a model says so and not a measurement."""

    def __bool__(self) -> bool:
        return self.sparse <= (1 - _GAIN) * self.dense

    def __str__(self) -> str:
        source = " (predicted)" if self.predicted else ""
        return f"{self.sparse * 1e3:.3g} ms against {self.dense * 1e3:.3g} ms dense{source}"


def measured_choice(module: nn.Module, structure: SparseStructure, input: Tensor) -> bool:
    """Whether `measured_speeds` finds the sparse operator faster."""
    return bool(measured_speeds(module, structure, input))


def measured_speeds(module: nn.Module, structure: SparseStructure, input: Tensor) -> Speeds:
    """How long the two operators take for this layer on this input, with the gradients that the call will need.

    Both are run interleaved on detached copies of nothing but references; the best of three rounds counts, since other
    load on the machine can only add time, and of up to nine where times do not repeat. Gradients and random numbers of
    the model are not touched.
    """
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (input, module.weight)]
    x, weight = (
        t.detach().requires_grad_(need) if need else t.detach()
        for t, need in zip((input, module.weight), needs, strict=True)
    )
    bias = None if module.bias is None else module.bias.detach()
    wanted = [t for t, need in zip((x, weight), needs, strict=True) if need]

    def dense() -> Tensor:
        return run_dense(module, x, weight, bias)

    def sparse() -> Tensor:
        return run_sparse(module, structure, x, weight, bias)

    times: dict[Callable[[], Tensor], list[float]] = {dense: [], sparse: []}
    for i in range(_MOST_ROUNDS):
        if i >= _ROUNDS and all(_repeats(found) for found in times.values()):
            break
        for run, found in times.items():
            found.append(_seconds(run, wanted))
    return Speeds(min(times[sparse]), min(times[dense]))


def _repeats(times: list[float]) -> bool:
    """Whether the best time is no accident: the second best is near it."""
    first, second = sorted(times)[:2]
    return second <= (1 + _AGREE) * first


def _seconds(run: Callable[[], Tensor], wanted: list[Tensor]) -> float:
    start = _now(wanted)
    result = run()
    if wanted:
        torch.autograd.grad(result, wanted, torch.ones_like(result))
    return _now([result]) - start


def _now(tensors: list[Tensor]) -> float:
    for t in tensors:
        if t.is_cuda:
            torch.cuda.synchronize(t.device)
    return time.perf_counter()
