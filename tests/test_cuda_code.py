"""The compile gate: what nvcc made of every kernel keeps to tests/cuda_budget.json, which needs no GPU.

Warnings are errors of the build itself (setup.py); nothing may go to local memory, in any kernel.
"""

from __future__ import annotations

import fnmatch
import json
import operator
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import census
import pytest

import sparsekern as sk
from sparsekern import _library

BUDGET = json.loads((Path(__file__).with_name("cuda_budget.json")).read_text())
FOUND = sorted(Path(sk.__file__).parent.glob("_cuda*.so"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
NO_SPILLS = {name: ["==", 0] for name in ("local", "spill_load", "spill_store")}
COMPARE = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}

pytestmark = [
    pytest.mark.skipif(not FOUND, reason=f"no CUDA kernels were built: {_library.cuda_obstacle}"),
    pytest.mark.skipif(bool(census.why_not()), reason=census.why_not()),
]


def take(architecture: str) -> dict[str, dict[str, int]]:
    """The census of the library, by names without namespaces."""
    found = census.census(FOUND[0], architecture)
    return {re.sub(r"\b(\w+::)+", "", name): counts for name, counts in found.items()}


@pytest.fixture(scope="module")
def figures():
    """Architecture -> figures of each kernel; of those that this nvcc knows."""
    there = [a for a in ARCHITECTURES if a in census.architectures(FOUND[0])["elf"]]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(there, pool.map(take, there), strict=True))


def breaches(architecture: str, kernels: dict[str, dict[str, int]]) -> list[str]:
    """Each figure that is not as the budget wants it, and each kernel without a budget."""
    found = []
    for kernel, counts in kernels.items():
        rules = next((rules for name, rules in BUDGET.items() if fnmatch.fnmatchcase(kernel, name)), None)
        if rules is None:
            found.append(f"{architecture} {kernel}: no line in cuda_budget.json")
        for name, (sign, limit) in {**NO_SPILLS, **(rules or {})}.items():
            if not COMPARE[sign](counts[name], limit):
                found.append(f"{architecture} {kernel}: {name} is {counts[name]}, wanted {sign} {limit}")
    return found


def test_every_kernel_keeps_to_its_budget(figures):
    found = [text for architecture, kernels in figures.items() for text in breaches(architecture, kernels)]
    assert not found, "\n".join(found)


def test_every_line_of_the_budget_has_a_kernel(figures):
    for architecture, kernels in figures.items():
        idle = [name for name in BUDGET if not fnmatch.filter(kernels, name)]
        assert not idle, f"{architecture} has no kernel for {idle}"


def test_a_breach_is_named_with_its_figure():
    bad = Counter({"registers": 200, "load_128": 3, "store_128": 8, "spill_load": 2})
    found = breaches("sm_80", {"step_kernel<float, 1, 1, SgdUpdate<float> >": bad, "stray": Counter()})
    for text in ("registers is 200, wanted <= 80", "load_128 is 3, wanted >= 6", "spill_load is 2, wanted == 0"):
        assert any(text in line for line in found)
    assert "sm_80 stray: no line in cuda_budget.json" in found


def test_older_and_newer_gpus_are_served():
    there = census.architectures(FOUND[0])
    assert {"sm_80", "sm_90"} <= set(there["elf"])
    assert there["ptx"], "PTX for GPUs that this nvcc does not know"
