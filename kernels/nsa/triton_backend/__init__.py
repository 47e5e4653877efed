"""Triton kernels of Native Sparse Attention. Imported only when used: triton is not there on every machine."""
