"""Softmax functions of logits that the caller already has."""
