"""A language model trained on text, with any of the heads."""
