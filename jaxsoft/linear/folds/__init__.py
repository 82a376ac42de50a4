"""What is streamed over the classes: each file is one `Fold`."""
