"""Kernels of `hidden @ kernel`, whose logits never leave the chip."""
