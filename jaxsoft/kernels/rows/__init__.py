"""Kernels of rows of stored logits."""
