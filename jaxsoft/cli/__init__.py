"""The command line: `jaxsoft train`, `regress`, `predict` and `devices`."""
