"""jaxsoft, the softmax layer of JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsoft._public import *  # noqa: F403
    from jaxsoft._public import __all__ as __all__

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the public names, and JAX with them, when the first is asked for.

    The command line is a part of this package, and answers to Ctrl-C, to `--help` and
    to what is misspelt before JAX is there.
    """
    if not name.startswith("__") or name == "__all__":
        public = importlib.import_module("jaxsoft._public")
        # What somebody has put in the place of a name stays there.
        names = [each for each in public.__all__ if each not in globals()]
        globals().update({each: getattr(public, each) for each in names})
        globals()["__all__"] = public.__all__
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names, too."""
    return sorted({*globals(), *__getattr__("__all__")})
