"""Softmax and Gumbel-softmax of rows of logits on TPUs."""
