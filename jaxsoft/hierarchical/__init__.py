"""Softmax functions that compute one path down a tree of classes, not every logit."""
