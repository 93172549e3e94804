"""The training program end to end, short: files, exact sparsity, the twin stays dense."""

import json

import torch

from sparsekern import train


def test_two_epochs(tmp_path):
    result = train.train(2, 0.95, 0, tmp_path, batch=256)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[-1]["phase"].startswith("sparse")
    assert abs(rows[-1]["sparsity"] - 0.95) < 1e-4 and result["sparsity"] == rows[-1]["sparsity"]
    sparse, dense = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("sparse", "dense"))
    assert sparse.keys() == dense.keys() == train.network().state_dict().keys()
    live = [sum(int(w.count_nonzero()) for n, w in state.items() if "conv" in n) for state in (sparse, dense)]
    assert live[1] > 2 * live[0] > 0  # channels that died in the sparse phase stay zero (section 3.7)
