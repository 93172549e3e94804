"""The census reads what compilers wrote, and a breach of a budget names the kernel and the figure."""

import subprocess

import census
import pytest

SOURCE = """
#include <cstdint>
namespace { template <int N> __global__ void copy(const float4* from, float4* to, int n) {
  __shared__ float tile[N];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = i;
  __syncthreads();
  if (i < n) { float4 x = from[i]; x.x = fmaf(x.y, tile[N - 1 - threadIdx.x], x.x); to[i] = x; }
} }
void start(const float4* a, float4* b, int n) { copy<128><<<1, 128>>>(a, b, n); }
"""
FOUND = {"copy<128>": dict.fromkeys(census.FIGURES, 0) | {"registers": 20, "load_128": 1}}


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"copy<128>": {"all": {"registers": "<= 20", "load_128": ">= 1"}, "sm_80": {"registers": "<= 1"}}}, []),
        ({"copy<128>": {"all": {"registers": "<= 19"}}},
         ["copy<128> on sm_90: registers is 20, the budget says <= 19"]),
        ({"copy<128>": {"all": {"registers": "<= 9"}, "sm_90": {"registers": "<= 20"}}}, []),
        ({"copy<128>": {"sm_90": {"load_128": ">= 2", "spill_store": "== 0"}}},
         ["copy<128> on sm_90: load_128 is 1, the budget says >= 2"]),
        ({"copy<128>": {"all": {"speed": ">= 2"}}}, ["copy<128>: the budget names an unknown figure 'speed'"]),
        ({}, ["copy<128> has no budget"]),
        ({"copy<128>": {}, "lost": {}}, ["lost has a budget and was not compiled for sm_90"]),
    ],
)  # fmt: skip
def test_breaches_name_kernel_and_figure(budget, said):
    assert census.breaches(FOUND, budget, "sm_90") == said


def test_names_lose_their_parameters_only():
    for mangled, name in [
        ("void (anonymous namespace)::k<float, (Mode)2>(float const*, int)", "k<float, (Mode)2>"),
        ("masked_sgd", "masked_sgd"),
        ("sk::f(int)", "sk::f"),
    ]:
        assert census._base_name(mangled) == name


@pytest.mark.skipif(bool(census.why_not()), reason=census.why_not())
def test_reads_what_nvcc_writes(tmp_path):
    (tmp_path / "copy.cu").write_text(SOURCE)
    flags = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90"]
    try:
        subprocess.run(["nvcc", "-c", *flags, "copy.cu"], cwd=tmp_path, check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nvcc compiles nothing here: {error}")
    for arch in ("sm_80", "sm_90"):
        ((name, row),) = census.census(tmp_path / "copy.o", arch).items()
        assert name == "copy<128>" and 0 < row["registers"] <= 40 and row["shared"] >= 512
        exact = ("load_128", "store_128", "load", "store", "barrier", "load_shared", "store_shared")
        assert [row[figure] for figure in exact] == [1] * len(exact)
        assert row["spill_load"] == row["spill_store"] == row["local"] == row["tensor_core"] == 0
        assert row["fma"] and name in census.table({name: row})
    with pytest.raises((ValueError, RuntimeError)):
        census.census(tmp_path / "copy.o", "sm_75")
