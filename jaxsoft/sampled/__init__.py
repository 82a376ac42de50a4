"""Losses over a sample of the classes."""
