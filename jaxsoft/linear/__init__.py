"""Softmax functions of `hidden @ kernel`, whose logits are never stored."""
