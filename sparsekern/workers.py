"""Training runs in processes of their own, several at a time, that stop with the one that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import connection
from pathlib import Path

from sparsekern.progress import Progress, StopRequest

_STOPPED = 130


def train_all(runs: dict[Path, str], epochs: dict[Path, int], jobs: int) -> dict[Path, str]:
    """Train each folder's recipe, given as TOML, `jobs` at a time, and say per folder what went wrong, if anything did.

    Ctrl-C and SIGTERM stop the runs behind a checkpoint and then raise KeyboardInterrupt; a run whose parent is gone
    stops in the same way. `epochs` is how long each run is, for the time left; what a run prints is in its log.txt.
    """
    waiting, running, failed = list(runs), {}, {}
    context = multiprocessing.get_context("spawn")
    done = {folder: _epochs_done(folder) for folder in runs}
    with StopRequest() as stop, Progress(sum(epochs.values()), sum(done.values()), "epoch") as bar:
        while (waiting and not stop.requested) or running:
            while waiting and len(running) < jobs and not stop.requested:
                folder = waiting.pop(0)
                process = context.Process(target=_train, args=(folder, runs[folder]), name=folder.name)
                process.start()
                running[process] = folder
            connection.wait([process.sentinel for process in running], timeout=0.5)
            if stop.requested:
                _stop(list(running))
            for process in [process for process in running if not process.is_alive()]:
                folder = running.pop(process)
                process.join()
                if process.exitcode:
                    failed[folder] = _reason(folder, process.exitcode)
            names = ", ".join(process.name for process in running)
            for folder in [*running.values(), *runs]:
                now = _epochs_done(folder)
                for _ in range(now - done[folder]):
                    bar.advance(f"{names}; {len(waiting)} waiting")
                done[folder] = max(now, done[folder])
    if stop.requested:
        raise KeyboardInterrupt
    return failed


def _epochs_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _stop(processes: list[multiprocessing.process.BaseProcess]) -> None:
    """Ask once; a second signal would end a run before its checkpoint is written."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _reason(folder: Path, code: int) -> str:
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines() or ["nothing in log.txt"]
    return f"failed with exit status {code}: {lines[-1]}" if code > 0 else f"ended by signal {-code}"


def _train(folder: Path, toml: str) -> None:
    """The process of one run; its exit status says how it went."""
    from sparsekern import checkpoint, recipe, train

    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the parent alone, which then asks each run once
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    checkpoint.make_folder(folder)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        train.train(recipe.parse(toml), folder, picture=False)
    except train.Stopped as stopped:
        print(stopped, flush=True)
        sys.exit(_STOPPED)
    except train.EXPLAINED as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)  # far more than a step and a checkpoint need
        os._exit(_STOPPED)
