"""The emulator of CUDA: right kernels give the right result in every order of threads, planted bugs are found."""

from __future__ import annotations

import ctypes

import emulator
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(bool(emulator.obstacle()), reason=emulator.obstacle())
SELFTEST = emulator.HERE / "selftest.cu"


@pytest.fixture(scope="module")
def library():
    lib = ctypes.CDLL(str(emulator.build("selftest.so", [SELFTEST])))
    for name in ("block_sum", "lane_mask", "divergent_barrier", "count_all", "missing_wait", "choose_ties",
                 "tile_product", "collectives"):  # fmt: skip
        getattr(lib, f"run_{name}").restype = ctypes.c_char_p
    yield lib
    lib.set_schedule(0)


@pytest.fixture(params=[0, 1, 7], ids=["forward", "reverse", "random"])
def emulated(library, request):
    """The library, with its threads in one of three orders."""
    library.set_schedule(request.param)
    return library


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def block_sum(library, bug):
    values, result = np.arange(1000, dtype=np.float32), np.zeros(1, np.float32)
    assert library.run_block_sum(pointer(values), 1000, pointer(result), ctypes.c_bool(bug)) is None
    return float(result[0])


def test_a_block_sum_is_right(emulated):
    assert block_sum(emulated, False) == 499500


def test_a_missing_barrier_is_wrong_in_some_order(library):
    found = []
    for order in (0, 1, 7):
        library.set_schedule(order)
        found.append(block_sum(library, True))
    assert any(value != 499500 for value in found)


def test_a_lane_mask_must_fit_its_lanes(emulated):
    result = np.zeros(32, np.int32)
    assert emulated.run_lane_mask(pointer(result), ctypes.c_bool(False)) is None
    assert result[:16].tolist() == [15] * 16
    message = emulated.run_lane_mask(pointer(result), ctypes.c_bool(True)).decode()
    assert "deadlock" in message or "names lanes that have exited" in message


def test_a_divergent_barrier_is_a_deadlock(emulated):
    result = np.zeros(64, np.int32)
    assert emulated.run_divergent_barrier(pointer(result), ctypes.c_bool(False)) is None and result.all()
    message = emulated.run_divergent_barrier(pointer(result), ctypes.c_bool(True)).decode()
    assert "deadlock in block (0,0,0): 48 at __syncthreads, 16 at a warp collective, 0 exited of 64" in message


def test_a_race_loses_counts(emulated):
    counter = np.zeros(1, np.uint32)
    assert emulated.run_count_all(pointer(counter), ctypes.c_bool(False)) is None and counter[0] == 256
    assert emulated.run_count_all(pointer(counter), ctypes.c_bool(True)) is None and counter[0] < 512


def test_a_copy_not_waited_for_is_poison(emulated):
    values, result = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    expected = np.where(np.arange(128) // 4 == 3, 0, values)
    assert emulated.run_missing_wait(pointer(values), pointer(result), ctypes.c_bool(False)) is None
    assert np.array_equal(result, expected)
    assert emulated.run_missing_wait(pointer(values), pointer(result), ctypes.c_bool(True)) is None
    assert np.array_equal(result, np.full(128, 0xFFFFFFFF, np.uint32))


def test_ties_by_who_comes_first_depend_on_the_order(library):
    chosen = {False: [], True: []}
    for bug, results in chosen.items():
        for order in (0, 1, 7):
            library.set_schedule(order)
            taken, found = np.zeros(1, np.uint32), np.zeros(128, np.uint32)
            assert library.run_choose_ties(pointer(taken), pointer(found), 50, ctypes.c_bool(bug)) is None
            results.append(found.tolist())
    assert all(found == [1] * 50 + [0] * 78 for found in chosen[False])
    assert chosen[True][0] != chosen[True][1] and chosen[True][0] != chosen[True][2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ldmatrix_and_mma_are_a_matrix_product(emulated, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    c = torch.empty(16, 8)
    brain = ctypes.c_bool(dtype == torch.bfloat16)
    error = emulated.run_tile_product(*(ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)), brain)
    assert error is None
    torch.testing.assert_close(c, a.float() @ b.float().t(), rtol=0, atol=1e-5)


def test_warp_collectives(emulated):
    result = np.zeros((32, 8), np.uint32)
    assert emulated.run_collectives(pointer(result)) is None
    value = [i * 7 % 32 for i in range(32)]
    for i in range(32):
        assert result[i].tolist() == [
            value[i - 3] if i >= 3 else value[i],
            value[i + 5] if i % 16 + 5 < 16 else value[i],
            value[i ^ 9],
            sum((v % 3 == 0) << k for k, v in enumerate(value)),
            sum((v % 4 == value[i] % 4) << k for k, v in enumerate(value)),
            sum(value),
            sum(v % 5 == 0 for v in value),
            value[i // 8 * 8 + 2],
        ]


PROGRAM = """
#include <vector>
#include "selftest.cu"
int main(int argc, char** argv) {
  const bool bug = argc > 2;
  const std::string name = argv[1];
  std::vector<float> values(128), sum(1);
  std::vector<uint32_t> words(128), counter(1);
  if (name == "block_sum") run_block_sum(values.data(), 128, sum.data(), bug);
  if (name == "out_of_bounds") run_out_of_bounds(values.data(), 128, bug);
  if (name == "count_all") run_count_all(counter.data(), bug);
  if (name == "histogram") run_histogram(words.data(), words.data() + 64, bug);
  return 0;
}
"""


@pytest.mark.parametrize(
    ("sanitizer", "names", "words"),
    [
        ("address", ["out_of_bounds"], "heap-buffer-overflow"),
        ("thread", ["block_sum", "count_all", "histogram"], "data race"),
    ],
)
def test_sanitizers_name_the_line_of_a_bug(tmp_path, sanitizer, names, words):
    source = emulator.ROOT / "build/emulator/selftest_main.cpp"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(PROGRAM)
    flags = ["-O1", "-g", f"-fsanitize={sanitizer}"]
    try:
        program = emulator.build(f"selftest_{sanitizer}", [source], flags, [SELFTEST])
    except RuntimeError as error:
        pytest.skip(f"g++ has no -fsanitize={sanitizer}: {error}")
    for name in names:
        good, bad = (emulator.sanitized([str(program), name, *more]) for more in ([], ["bug"]))
        assert good.returncode == 0 and words not in good.stderr, good.stderr
        assert bad.returncode != 0 and words in bad.stderr and "selftest.cu:" in bad.stderr and name in bad.stderr
