"""Fashion-MNIST from files, gzipped or not, and the errors that say how to get it."""

import gzip
import struct
import sys

import pytest
import torch

from sparsekern import data
from sparsekern.data import fashion_mnist


def write(folder, name, shape, values, ending=""):
    folder.mkdir(parents=True, exist_ok=True)
    content = b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(values)
    (folder / (name + ending)).write_bytes(gzip.compress(content) if ending else content)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two places to look in, empty; the files are those of six training images and two others of 2x3 pixels."""
    found = tmp_path / "torchvision", tmp_path / "debian"
    monkeypatch.setattr(fashion_mnist, "FOLDERS", found)
    monkeypatch.setattr(fashion_mnist, "ROOT", tmp_path)
    return found


def fill(first, second):
    images, labels, held_images, held_labels = fashion_mnist.FILES
    write(first, images, (6, 2, 3), range(36))
    write(second, labels, (6,), [0, 9, 1, 2, 3, 4], ".gz")
    write(second, held_images, (2, 2, 3), [0, 255] * 6, ".gz")
    write(first, held_labels, (2,), [7, 8])


def test_pixels_labels_and_the_number_of_training_images(folders):
    fill(*folders)
    whole, part = data.load("fashion_mnist"), data.load("fashion_mnist", 4)
    assert whole.images.shape == (6, 1, 2, 3) and whole.validation_images.shape == (2, 1, 2, 3)
    torch.testing.assert_close(whole.images.flatten(), torch.arange(36) / 127.5 - 1)
    assert whole.validation_images.unique().tolist() == [-1, 1] and whole.classes == 10
    assert whole.labels.tolist() == [0, 9, 1, 2, 3, 4] and whole.validation_labels.tolist() == [7, 8]
    assert torch.equal(part.images, whole.images[:4]) and torch.equal(part.labels, whole.labels[:4])
    assert torch.equal(part.validation_images, whole.validation_images)
    with pytest.raises(data.DataError, match="data.train_images: given 7, allowed is at most 6"):
        data.load("fashion_mnist", 7)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"x" + b[1:], lambda b: b"", lambda b: b + b"x"])
def test_a_damaged_file_is_named(folders, damage, ending):
    fill(*folders)
    path = folders[bool(ending)] / (fashion_mnist.FILES[1 if ending else 0] + ending)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError, match=path.name):
        data.load("fashion_mnist")


def test_without_files_torchvision_or_network(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(data.DataError, match=r"apt-get install dataset-fashion-mnist .*'sparsekern\[vision\]'"):
        data.load("fashion_mnist")

    class FashionMNIST:
        def __init__(self, root, download):
            if reason:
                raise reason
            fill(*folders)

    monkeypatch.setitem(sys.modules, "torchvision.datasets", type(sys)("datasets"))
    sys.modules["torchvision.datasets"].FashionMNIST = FashionMNIST
    reason = OSError("no route")
    with pytest.raises(data.DataError, match=r"cannot be downloaded \(no route\): .*apt-get"):
        data.load("fashion_mnist")
    reason = None
    assert len(data.load("fashion_mnist").labels) == 6
