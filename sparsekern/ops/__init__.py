"""The operators. Each module is the specification of one; each function carries its `.reference`."""

from sparsekern.ops.masked_sgd import masked_sgd_
from sparsekern.ops.packing import pack_mask, unpack_mask

__all__ = ["masked_sgd_", "pack_mask", "unpack_mask"]
