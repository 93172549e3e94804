"""AC/DC training of a small residual network on scikit-learn's digits: python -m sparsekern.train [--epochs 20].

Leaves runs/NAME/metrics.jsonl, sparse.pt and dense.pt (plain state dicts). The dense twin is the network at the end of
the last dense phase, which AC/DC trains along (arXiv 2308.02060).
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import sparsekern as sk


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def network() -> nn.Module:
    """A residual network for 8x8 grey images and 10 classes; (N, 1, 8, 8) -> (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        Block(32, 32, 1), Block(32, 64, 2), Block(64, 64, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images and labels, test images and labels: 1437 and 360, split by a fixed permutation."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return x[train], y[train], x[test], y[test]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers in evaluation mode; the mode is restored."""
    model.eval()
    right = (model(x).argmax(1) == y).float().mean().item()
    model.train()
    return right


def save(state: dict, path: Path) -> None:
    """Write beside the target and rename, so a failed write leaves the last good file."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sparsity(masks: sk.MaskSet) -> float:
    """Share of exact zeros among the prunable weights, counted from the weights."""
    weights = [masks.parameter(name) for name in masks]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def train(epochs: int, target: float, seed: int, folder: Path, batch: int = 64) -> dict:
    """Train, write the run's files, return the final figures."""
    torch.manual_seed(seed)
    x, y, test_x, test_y = digits()
    model = network()
    optimizer = sk.MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    steps = -(-len(y) // batch)
    total = steps * epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: sk.linear_lr(min(step, total), total_steps=total, warmup_steps=min(2 * steps, total // 2)),
    )
    sparsifier = sk.ACDC(target, sk.acdc_schedule(epochs=epochs)).attach(model, optimizer, steps_per_epoch=steps)
    folder.mkdir(parents=True, exist_ok=True)
    result, start = {"seed": seed}, time.perf_counter()
    with (folder / "metrics.jsonl").open("w") as log:
        for epoch in range(epochs):
            for i, chosen in enumerate(torch.randperm(len(y)).split(batch)):
                loss = functional.cross_entropy(model(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                phase = sparsifier.phase
                if isinstance(phase, sk.Dense):
                    twin = {k: v.clone() for k, v in model.state_dict().items()}
                if i == steps - 1:  # measured before the next phase begins
                    row = {
                        "epoch": epoch, "phase": str(phase), "loss": loss.item(),
                        "accuracy": accuracy(model, test_x, test_y), "sparsity": sparsity(sparsifier.masks),
                    }  # fmt: skip
                sparsifier.step()
            log.write(json.dumps(row) + "\n")
            left = (time.perf_counter() - start) / (epoch + 1) * (epochs - epoch - 1)
            print(f"epoch {epoch + 1:3}/{epochs} {row['phase']:12} loss {row['loss']:.4f} accuracy "
                  f"{row['accuracy']:.4f} sparsity {row['sparsity']:.4f}  {left:4.0f} s left", flush=True)  # fmt: skip
    result |= {"sparse_accuracy": row["accuracy"], "sparsity": row["sparsity"]}
    save(sparsifier.finalize().state_dict(), folder / "sparse.pt")
    print(f"\n{sparsifier.layers()}\n")
    model.load_state_dict(twin)
    save(twin, folder / "dense.pt")
    return {**result, "dense_accuracy": accuracy(model, test_x, test_y)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="demo", help="folder of the run below runs/")
    options = parser.parse_args()
    folder = Path("runs") / options.name
    result = train(options.epochs, options.sparsity, options.seed, folder)
    print(f"sparse accuracy {result['sparse_accuracy']:.4f} at sparsity {result['sparsity']:.4f}, "
          f"dense twin {result['dense_accuracy']:.4f}; files in {folder}")  # fmt: skip


if __name__ == "__main__":
    main()
