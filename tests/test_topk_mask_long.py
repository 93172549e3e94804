"""topk_mask beyond 2^31 scores: indices and counts are 64 bits wide. Takes about 1 GB.

Zeros that nobody wrote are one page for the system, so the scores themselves take none.
"""

import numpy
import pytest
import torch

import sparsekern as sk

ROWS, COLUMNS = 2**16 + 8, 2**15
PLACES = [5, 2**31 - 1, 2**31, 2**31 + 70, ROWS * COLUMNS - 1]

pytestmark = pytest.mark.skipif(bool(sk.degradation), reason="the reference would take minutes and 30 GB")


@pytest.fixture(scope="module")
def scores():
    # torch.zeros would write them.
    found = torch.from_numpy(numpy.zeros((ROWS, COLUMNS), dtype=numpy.float16))
    for value, place in enumerate(PLACES, start=1):
        found.view(-1)[place] = value
    return found


def live(packed):
    """Indices of the ones."""
    return [
        8 * byte + bit for byte in packed.nonzero().flatten().tolist() for bit in range(8) if packed[byte] >> bit & 1
    ]


@pytest.mark.parametrize(("keep", "expected"), [(3, PLACES[2:]), (5, PLACES), (7, [0, 1, *PLACES])])
def test_places(scores, keep, expected):
    assert live(sk.ops.topk_mask([scores], keep)[0]) == expected


def test_places_of_blocks(scores):
    expected = [place // 4 * 4 + i for place in PLACES for i in range(4)]
    assert live(sk.ops.topk_mask([scores], len(PLACES), pattern="1x4")[0]) == expected


def test_ties_over_a_list():
    ones = torch.zeros(2**24, dtype=torch.float16)
    ones[7] = 1
    first, *others = sk.ops.topk_mask([ones] * 129, 129 + 4)
    assert live(first) == [0, 1, 2, 3, 7] and all(live(mask) == [7] for mask in others)
