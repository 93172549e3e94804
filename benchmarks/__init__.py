"""Benchmarks: `python -m benchmarks.bench_NAME --quick`, or `make bench`; `harness` says how a number is made."""

import os

# Huge pages decide memory-bound rows. torch reads this at its first allocation; it serves candidate and baseline alike.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# torch's profiler otherwise reports at each start that it finds no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
