"""The operators. Each module is the specification of one; each function carries its `.reference`."""

from sparsekern.ops.masked_sgd import masked_sgd_
from sparsekern.ops.packing import pack_mask, unpack_mask
from sparsekern.ops.topk_mask import topk_mask

__all__ = ["masked_sgd_", "pack_mask", "topk_mask", "unpack_mask"]
