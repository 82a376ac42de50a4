"""Lets `python -m jaxsoft` do what the console script `jaxsoft` does."""

import sys

from jaxsoft.cli.main import main

sys.exit(main())
