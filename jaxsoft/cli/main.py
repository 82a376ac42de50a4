"""The entry point `jaxsoft`, which is light: it heeds signals before all else.

Exit codes: 0 done; 1 the job itself failed; 2 bad input, said in one line on stderr,
with nothing written; 129, 130, 143 stopped by SIGHUP, Ctrl-C or SIGTERM; 141 nobody
reads what is printed.
"""

import signal
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: the words after the program's name. None reads them from `sys`, has
        the process as a whole heed signals and spell out what it cannot print, and
        ends it.

    Returns:
      The exit code.
    """
    if arguments is not None:
        from jaxsoft.cli.commands import run

        return run(arguments)
    # The thread that heeds signals takes some imports, too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from jaxsoft.cli import process

    process.Signals.watch()
    process.prepare_output()
    from jaxsoft.cli.commands import run

    try:
        code = run(sys.argv[1:])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    process.leave(process.close_output(code))
