"""Sparse training kernels for PyTorch. See README.md."""

from sparsekern import _library, ops
from sparsekern.optim import MaskedSGD

degradation = _library.load_kernels()
"""Empty when the compiled kernels are in use, else the reason why they are not."""

__version__ = "0.1.0.dev0"
__all__ = ["MaskedSGD", "__version__", "degradation", "ops"]
