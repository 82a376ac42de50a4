"""Softmax and Gumbel-softmax of rows of logits on Hopper's and Blackwell's GPUs."""
