"""The Triton kernels for CUDA tensors, and what launches them; imported only where Triton is used."""
