"""The operators. Each module is the specification of one; each function carries its `.reference`."""

from sparsekern.ops import sparse_cuda as _sparse_cuda  # noqa: F401, serves operators on CUDA
from sparsekern.ops.batch_norm import batch_norm
from sparsekern.ops.masked_adamw import masked_adamw_
from sparsekern.ops.masked_combine import masked_combine_
from sparsekern.ops.masked_sgd import masked_sgd_
from sparsekern.ops.movement_step import movement_step_
from sparsekern.ops.packing import pack_mask, unpack_mask
from sparsekern.ops.signed_sums import signed_sums
from sparsekern.ops.soft_threshold import soft_threshold_
from sparsekern.ops.sparse_conv2d import sparse_conv2d
from sparsekern.ops.sparse_linear import sparse_linear
from sparsekern.ops.sparse_structure import SparseStructure, sparse_structure
from sparsekern.ops.threshold_mask import threshold_mask
from sparsekern.ops.topk_bounds import topk_bounds
from sparsekern.ops.topk_mask import topk_mask
from sparsekern.ops.topk_nested import topk_nested

__all__ = [
    "SparseStructure", "batch_norm", "masked_adamw_", "masked_combine_", "masked_sgd_", "movement_step_", "pack_mask",
    "signed_sums", "soft_threshold_", "sparse_conv2d", "sparse_linear", "sparse_structure", "threshold_mask",
    "topk_bounds", "topk_mask", "topk_nested", "unpack_mask",
]  # fmt: skip
