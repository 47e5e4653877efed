"""Native Sparse Attention: Triton kernels, each beside the plain PyTorch definition it must equal."""
