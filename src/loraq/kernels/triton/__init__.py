"""Fused kernels in Triton, and the back end that launches them."""
