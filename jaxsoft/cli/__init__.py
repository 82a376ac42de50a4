"""The command line: `jaxsoft train`, `regress`, `predict`, `compare` and `devices`."""
