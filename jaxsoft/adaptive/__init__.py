"""Adaptive softmax: frequent classes in full, bands of rare ones in fewer features."""
