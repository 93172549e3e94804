"""Fashion-MNIST (arXiv 1708.07747): 60,000 + 10,000 grey images of clothes, 28x28 pixels, 10 classes.

The four files are looked for, as they are or gzipped, in `data/FashionMNIST/raw` below the current folder, where
torchvision puts them, and where Debian's package dataset-fashion-mnist does. If they are in neither place, torchvision
downloads them to the first.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import torch
from torch import Tensor

from sparsekern.data.dataset import DataError, Dataset

ROOT = Path("data")
FOLDERS = (ROOT / "FashionMNIST/raw", Path("/usr/share/datasets/fashion-mnist"))
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def load() -> Dataset:
    """60,000 images to train on and 10,000 to validate on, pixels scaled to -1..1; DataError if there are none."""
    found = [_find(name) for name in FILES]
    if None in found:
        _download()
        found = [_find(name) for name in FILES]
    images, labels, held_images, held_labels = (read_idx(path) for path in found if path is not None)
    return Dataset(_scaled(images), labels.long(), _scaled(held_images), held_labels.long(), classes=10)


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.unsqueeze(1).float() / 127.5 - 1


def _find(name: str) -> Path | None:
    paths = (folder / (name + ending) for folder in FOLDERS for ending in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _download() -> None:
    ways = (
        f"looked for {FILES[0]} and its like in {' and '.join(map(str, FOLDERS))}; get them by apt-get install "
        "dataset-fashion-mnist (Debian, Ubuntu), or by pip install 'sparsekern[vision]' and a network"
    )
    try:
        from torchvision.datasets import FashionMNIST
    except ModuleNotFoundError as error:
        raise DataError(f"fashion_mnist: the files are missing: {ways}") from error
    print(f"Downloading Fashion-MNIST to {FOLDERS[0]}", flush=True)
    try:
        FashionMNIST(ROOT, download=True)
    except (OSError, RuntimeError) as error:  # no network; a file that is not what it should be
        raise DataError(f"fashion_mnist: the files cannot be downloaded ({error}): {ways}") from error


def read_idx(path: Path) -> Tensor:
    """The bytes of an IDX file, gzipped or not, as uint8 in its shape; DataError if it is none or not whole."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions, and each of them in four bytes.
    rank = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    start = 4 + 4 * rank
    if not rank or torch.Size(shape).numel() != len(content) - start:
        raise DataError(f"{path}: is no whole IDX file of bytes; delete it to get it anew")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)
