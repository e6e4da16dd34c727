"""Triton kernels; imported only where Triton is and a plan needs them."""
