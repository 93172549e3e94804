"""Files that are whole or not there: training checkpoints, and every other file of a run.

A checkpoint is what torch.save writes, plus a SHA-256 of it in the comment of its zip archive, so a plain
`torch.load(path, weights_only=True)` opens it too, without this package. torch alone checks no sums: a flipped bit
would load as a wrong weight. Nothing is unpickled beyond tensors, numbers, strings and containers of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

_MARK = b"sparsekern-sha256="
_COMMENT = len(_MARK) + hashlib.sha256().digest_size * 2


class CheckpointError(RuntimeError):
    """A file of a run cannot be written or read; the message names the file and the problem."""

    def __init__(self, path: Path, problem: str):
        super().__init__(f"{path}: {problem}")
        self.path = path


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents where they are missing; CheckpointError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(folder, f"cannot be made: {error.strerror or error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, or raise CheckpointError and leave the file that was there.

    The content is on the disk before the name changes, and the name before this returns: neither a crash nor a power
    cut leaves half a file under the final name.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        kept = "; the file that was there is unchanged" if path.exists() else ""
        raise CheckpointError(path, f"cannot be written: {error.strerror or error}{kept}") from error


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder, and needs no such sync
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` with its checksum. CheckpointError if it cannot be written, or could not be read again safely."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    # An archive ends with the length of its comment: two bytes, zero so far.
    content = content[:-2] + _COMMENT.to_bytes(2, "little") + _MARK
    content += hashlib.sha256(content).hexdigest().encode()
    _unpack(content, path, torch.device("cpu"))
    write_atomically(path, content)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save` wrote, its tensors on `device`; CheckpointError if the file is missing, damaged or no checkpoint."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(path, "is missing") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    digest = content[-_COMMENT + len(_MARK) :]
    if content[-_COMMENT : -_COMMENT + len(_MARK)] != _MARK:
        raise CheckpointError(path, f"is truncated or no checkpoint: its {len(content)} bytes do not end in a checksum")
    found = hashlib.sha256(content[: -len(digest)]).hexdigest().encode()
    if found != digest:
        raise CheckpointError(path, f"is damaged: its SHA-256 is {found.decode()}, recorded is {ascii(digest)[2:-1]}")
    return _unpack(content, path, device)


def _unpack(content: bytes, path: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(path, f"holds more than tensors and plain values: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(path, f"must hold a dict, holds a {type(state).__name__}")
    return state
