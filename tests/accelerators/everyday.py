"""Functions of stored logits and what a user would write, to compile for a target.

By hand, `python -m benchmarks everyday --compiled v6e` has every function.
"""

import dataclasses
from collections.abc import Mapping

from benchmarks import everyday_compiled, everyday_draws
from benchmarks.everyday_case import GRADIENT, VALUE

__all__ = ["CELLS", "main"]

_SIZE = "512x8192"
# The names of cases, and what is compiled of each.
CELLS: Mapping[str, tuple[str, ...]] = {
    "softmax, T = 0.7": (VALUE,),
    "log_softmax, T = 0.7": (VALUE,),
    "entropy, T = 0.7": (GRADIENT,),
    "softmax_cross_entropy, labels": (VALUE, GRADIENT),
    "softmax_cross_entropy, targets": (VALUE, GRADIENT),
    "softmax_cross_entropy, label_smoothing=0.1": (GRADIENT,),
    "softmax_cross_entropy, weights, mean": (GRADIENT,),
}


def main(target):
    """Compiles both programs of each cell, and reports what they take."""
    cases = [
        dataclasses.replace(
            case,
            value=VALUE in CELLS[case.name],
            moving=case.moving if GRADIENT in CELLS[case.name] else "",
        )
        for case in everyday_draws.ROOM.cases
        if case.name in CELLS
    ]
    room = dataclasses.replace(everyday_draws.ROOM, cases=tuple(cases))
    everyday_compiled.tell(target, [room], (), [_SIZE])
