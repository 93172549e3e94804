"""Triton kernels of the operators, for GPUs where no CUDA library was built.

One file per operator; `sparsekern.backends` imports it when an operator first meets a GPU tensor, so that an import of
sparsekern touches neither Triton nor a device. TRITON_INTERPRET=1 (with SPARSEKERN_BACKEND=triton) runs the same
kernels on CPU tensors, slowly, for tests.
"""
