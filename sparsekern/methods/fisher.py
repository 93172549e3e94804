"""The block-diagonal empirical Fisher information of a weight, kept as its inverse.

F = damp * I + 1/m * sum over m gradients of g g^T, restricted to blocks of consecutive weights. Each gradient changes
the inverse by a rank-one formula (Woodbury), so F itself is never built. Weights are put in rows with the input axis
(dim 1) last and padded so that groups of four input channels, and whole blocks, do not straddle.
"""

from __future__ import annotations

import torch
from torch import Tensor


class InverseFisher:
    """The inverse for one weight; at first I / damp.

    `block` weights form a block, a multiple of `group`. `count` is m, the number of gradients to come: the sum is
    divided by it from the first one on. Memory: `block` numbers of float32 for each weight.
    """

    def __init__(self, like: Tensor, block: int, group: int, damp: float, count: int):
        self.shape, self.block, self.group, self.count = like.shape, block, group, count
        blocks = self.split(torch.zeros_like(like, dtype=torch.float32)).shape[0]
        identity = torch.eye(block, device=like.device) / damp
        self.inverse = identity.repeat(blocks, 1, 1)

    def split(self, value: Tensor) -> Tensor:
        """A tensor of the weight's shape as (blocks, block) float32, zeros where it is padded."""
        rows = value.detach().float().movedim(1, -1) if value.dim() > 1 else value.detach().float()
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % self.group)).reshape(-1)
        return torch.nn.functional.pad(rows, (0, -rows.numel() % self.block)).view(-1, self.block)

    def join(self, blocks: Tensor) -> Tensor:
        """The reverse of `split`."""
        if len(self.shape) < 2:
            return blocks.reshape(-1)[: self.shape.numel()].view(self.shape)
        moved = (self.shape[0], *self.shape[2:], self.shape[1] + -self.shape[1] % self.group)
        rows = blocks.reshape(-1)[: torch.Size(moved).numel()].view(moved)
        return rows[..., : self.shape[1]].movedim(-1, 1)

    def add(self, gradient: Tensor) -> None:
        """Account for one gradient; F += g g^T / count."""
        g = self.split(gradient)
        image = torch.einsum("bij,bj->bi", self.inverse, g)
        self.inverse.sub_(torch.einsum("bi,bj->bij", image / (self.count + (g * image).sum(1, True)), image))

    def scores(self, weight: Tensor) -> Tensor:
        """1/2 w_Q^T ((F^-1)_QQ)^-1 w_Q for each group Q, in the shape of the weight: what pruning Q costs the loss."""
        w = self._groups(self.split(weight))
        cost = 0.5 * (w * self._solve(w)).sum(-1, keepdim=True)
        return self.join(cost.expand(w.shape).reshape(w.shape[0], self.block))

    def compensation(self, weight: Tensor, pruned: Tensor) -> Tensor:
        """-F^-1 E_Q ((F^-1)_QQ)^-1 w_Q summed over the groups Q where bool `pruned`; zero in padding."""
        w = self._groups(self.split(torch.where(pruned, weight.detach(), 0)))
        solved = self._solve(w).reshape(w.shape[0], self.block)
        return self.join(-torch.einsum("bij,bj->bi", self.inverse, solved))

    def _groups(self, blocks: Tensor) -> Tensor:
        return blocks.view(blocks.shape[0], self.block // self.group, self.group)

    def _solve(self, w: Tensor) -> Tensor:
        n, q = self.block // self.group, self.group
        diagonal = self.inverse.view(-1, n, q, n, q).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        return w / diagonal[..., 0] if q == 1 else torch.linalg.solve(diagonal, w.unsqueeze(-1)).squeeze(-1)
