"""Fair timing of a few callables against each other on a machine that is not quiet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over the rounds, and the spread of their middle half."""

    median: float
    iqr: float


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = 9,
    sample_seconds: float = 0.002,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time each contender, in turn in every round (A B A B ...), after a round of warm-up.

    A sample repeats a short call until it lasts about `sample_seconds`. On a GPU a sample ends when its work has ended.
    Raises ValueError for fewer than 2 rounds.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}")
    gpu = torch.device(device).type == "cuda"
    repeats = {}
    for name, call in contenders.items():
        call()
        once = max(_sample(call, 1, gpu), 1e-7)
        repeats[name] = max(1, min(1000, round(sample_seconds / once)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name].append(_sample(call, repeats[name], gpu) / repeats[name])
    quarters = {name: statistics.quantiles(values, n=4) for name, values in samples.items()}
    return {name: Timing(statistics.median(samples[name]), quarters[name][2] - quarters[name][0]) for name in samples}


def _sample(call: Callable[[], object], repeats: int, gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
