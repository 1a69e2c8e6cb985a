"""Kernels for the CPU: products with packed weights, and the whole decoder in one call."""
