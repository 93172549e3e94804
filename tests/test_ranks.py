"""Masks and weights agree on every rank: what a method reads of gradients is their mean over the ranks."""

import pytest
import torch
from every_method import STEPS, setup
from method_steps import batch
from torch import nn

import sparsekern as sk


def train(name, rank):
    """Each rank has batches of its own; batch norm runs on its fixed statistics."""
    model, optimizer, sparsifier = setup(name)
    wrapped = nn.parallel.DistributedDataParallel(model.eval(), gradient_as_bucket_view=True)
    for i in range(STEPS):
        x, y = batch(2 * i + rank)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        sparsifier.step()
    masks = sparsifier.forward_masks().hash()
    return masks, torch.cat([p.detach().flatten() for p in model.parameters()])


def run(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: train(name, rank) for name in sk.METHODS}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_every_method_agrees_on_two_ranks(tmp_path):
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert set(first) == set(sk.METHODS)
    for name, (masks, weights) in first.items():
        assert masks == second[name][0], name
        torch.testing.assert_close(second[name][1], weights, rtol=0, atol=0, msg=name)
