"""The results of a finished run as plain values: what result.json holds and the report shows."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern import models, recipe, speeds
from sparsekern.evaluation import count_sparsity, evaluate

if TYPE_CHECKING:
    from sparsekern.train import Run


def gather(run: Run, name: str) -> dict[str, Any]:
    """Score both networks, count the zeros, and time the kernels if the recipe asks for it."""
    masks = run.sparsifier.forward_masks()
    weights = run.sparsifier.forward_weights()
    trained, timed = dict(run.layers), []
    if run.recipe.measure:
        print("\nMeasuring the kernels on this network ...", flush=True)
        allocation = getattr(run.sparsifier, "allocation", None)
        pattern = getattr(allocation, "pattern", "unstructured")
        x, y = (part[: run.recipe.batch] for part in (run.data.images, run.data.labels))
        timed = speeds.measure(run.model, masks, x, y, pattern)
    return {
        "name": name, "recipe": recipe.to_toml(run.recipe), "device": str(run.device), "machine": machine(),
        "steps": run.step, "seconds": run.seconds, "metrics": run.rows,
        "phases": [
            {"start": span.start, "stop": span.stop,
             "sparsity": float(span.phase.sparsity) if isinstance(span.phase, sk.Sparse) else None}
            for span in getattr(run.sparsifier.schedule, "phases", ())
        ],
        "sparse": _scores(run.model, run, list(weights.values())),
        "dense": _twin_scores(run),
        "flops": {"dense": run.cost.dense, "inference": run.cost.forward(run.sparsifier), "training": run.cost.spent},
        "layers": [
            {"name": key.removesuffix(".weight"), "shape": list(w.shape), "weights": w.numel(),
             "live": int(w.count_nonzero()), "ran": trained.get(key.removesuffix(".weight"), "dense")}
            for key, w in weights.items()
        ],
        "speeds": timed,
    }  # fmt: skip


def _scores(model: nn.Module, run: Run, prunable: list[Tensor]) -> dict[str, float]:
    found = evaluate(model, run.data.validation_images, run.data.validation_labels)
    return found | {"sparsity": count_sparsity(prunable)}


def _twin_scores(run: Run) -> dict[str, float] | None:
    """Of the dense network that the method leaves behind, if it does."""
    if run.twin is None:
        return None
    # Not a copy of the trained model: hooks of its method would come along.
    channels = run.data.images.shape[1]
    dense = models.build(run.recipe.model, channels, run.data.classes).to(run.device)
    dense.load_state_dict(run.twin)
    return _scores(dense, run, [dense.get_parameter(key) for key in run.sparsifier.masks])


def machine() -> str:
    """What the speeds depend on, in one line."""
    kernels = f"references only: {sk.degradation}" if sk.degradation else f"{torch.ops.sparsekern.cpu_isa()} kernels"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{platform.machine()}{gpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {kernels}, "
        f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"
    )
