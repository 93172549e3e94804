"""Learning-rate multipliers as pure functions of the step number, for any optimizer.

They go through `torch.optim.lr_scheduler.LambdaLR`, for example, or are multiplied onto the rate in one's own loop.
"""

from __future__ import annotations

import math

from sparsekern.phases import check_whole


def linear_lr(step: int, *, total_steps: int, warmup_steps: int = 0) -> float:
    """Learning-rate multiplier: linear warm-up to 1, then a straight line that reaches 0 at `total_steps`.

    Warm-up step i of w gets (i + 1) / w: no step is wasted at rate 0, and the last warm-up step has the full rate.
    """
    warmup, progress = _lr_position(step, total_steps, warmup_steps)
    return warmup if warmup is not None else 1.0 - progress


def cosine_lr(step: int, *, total_steps: int, warmup_steps: int = 0) -> float:
    """Learning-rate multiplier: linear warm-up to 1 as in `linear_lr`, then half a cosine to 0 at `total_steps`."""
    warmup, progress = _lr_position(step, total_steps, warmup_steps)
    return warmup if warmup is not None else 0.5 * (1.0 + math.cos(math.pi * progress))


def constant_lr(step: int, *, total_steps: int, warmup_steps: int = 0) -> float:
    """Learning-rate multiplier: linear warm-up to 1 as in `linear_lr`, then 1."""
    warmup, _ = _lr_position(step, total_steps, warmup_steps)
    return warmup if warmup is not None else 1.0


def _lr_position(step: int, total_steps: int, warmup_steps: int) -> tuple[float | None, float]:
    """(warm-up multiplier or None once it is over, share of the steps after the warm-up that lie behind)."""
    step = check_whole(step, "step", least=0)
    total = check_whole(total_steps, "total_steps", least=1)
    warmup = check_whole(warmup_steps, "warmup_steps", least=0)
    if warmup > total:
        raise ValueError(f"warmup_steps must be at most total_steps={total}, got {warmup}")
    if step < warmup:
        return (step + 1) / warmup, 0.0
    # Schedulers ask for one step past the end after the last update; that and anything later is the end.
    if step >= total:
        return None, 1.0
    return None, (step - warmup) / (total - warmup)
