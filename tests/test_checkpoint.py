"""Checkpoints are whole or refused (truncated, flipped, missing, foreign, unsafe); a full disk keeps the last good."""

import errno
import os
import re

import pytest
import torch

from sparsekern import checkpoint
from sparsekern.checkpoint import CheckpointError

STATE = {
    "w": torch.arange(6.0).reshape(2, 3), "bits": torch.tensor([3], dtype=torch.uint8), "step": 7,
    "rows": [{"phase": "dense", "loss": 0.5}], "twin": None,
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    """A good checkpoint."""
    checkpoint.save(STATE, tmp_path / "c.pt")
    return tmp_path / "c.pt"


def test_round_trip_also_by_plain_torch(path):
    for loaded in (checkpoint.load(path), torch.load(path, weights_only=True)):
        assert torch.equal(loaded.pop("w"), STATE["w"]) and torch.equal(loaded.pop("bits"), STATE["bits"])
        assert loaded == {key: STATE[key] for key in ("step", "rows", "twin")}
    assert os.listdir(path.parent) == ["c.pt"]


def test_every_flipped_bit_is_found(path):
    good = path.read_bytes()
    for i in range(0, len(good) * 8, 61):  # 61 is coprime to 8: all bits of a byte take their turn
        bad = bytearray(good)
        bad[i // 8] ^= 1 << i % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="damaged|truncated"):
            checkpoint.load(path)


@pytest.mark.parametrize("length", [0, 1, 100, -1, -64, -100])
def test_truncated(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}.*truncated"):
        checkpoint.load(path)


def test_missing_foreign_and_unreadable(tmp_path):
    with pytest.raises(CheckpointError, match=r"no\.pt: is missing"):
        checkpoint.load(tmp_path / "no.pt")
    torch.save(STATE, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"foreign\.pt: is truncated or no checkpoint"):
        checkpoint.load(tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        checkpoint.load(tmp_path)


class Unsafe:
    """No tensor and no plain value."""


def test_unsafe_content_is_refused_before_anything_is_written(path):
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values"):
        checkpoint.save({"object": Unsafe()}, path)
    with pytest.raises(CheckpointError, match="must hold a dict, holds a list"):
        checkpoint.save([1], path)
    assert path.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which fails as a full disk does")
def test_full_disk_keeps_the_last_good_file(path):
    before = path.read_bytes()
    partial = path.with_name("c.pt.partial")
    partial.symlink_to("/dev/full")  # the write really ends in ENOSPC
    with pytest.raises(CheckpointError, match=r"c\.pt: cannot be written: No space left.*unchanged") as caught:
        checkpoint.save(STATE, path)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert path.read_bytes() == before and os.listdir(path.parent) == ["c.pt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_late_in_the_write(path, monkeypatch, call):
    """A disk that fills only when the data are flushed, or a rename that fails."""
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (type(path), "replace")), fail)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save({"other": 1}, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["c.pt"]


def test_data_reach_the_disk_before_the_name_and_the_name_before_the_return(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, type(path).replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_mode >> 12), fsync(handle)))
    monkeypatch.setattr(type(path), "replace", lambda self, target: (calls.append("rename"), replace(self, target)))
    checkpoint.save(STATE, path)
    assert calls == [0o10, "rename", 0o04]  # regular file, rename, folder


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/run: cannot be made: Not a directory"):
        checkpoint.make_folder(tmp_path / "file" / "run")
