"""Examples that run from the command line: `python -m jaxsoft.examples.NAME`."""
