"""Does `SoftmaxRegression` train 100,000 classes in the memory of a small machine?

200,000 rows of 256 features, one a class and the others by Zipf's law, fitted by
minibatches under each head, in a process of its own whose peak of resident memory
counts everything: Python, the table, the parameters and Adam's moments. Nothing else
fits this: scikit-learn's L-BFGS would keep twenty copies of the gradient in float32,
2 GiB, and the logits of all rows, 75 GiB.
"""

import json
import pathlib
import resource
import subprocess
import sys
import time
import warnings
from typing import Any

import numpy as np

from benchmarks import peers, workloads
from benchmarks.session import Finding, Result, Session, Work
from benchmarks.timing import Timing
from benchmarks.workloads import ManyClassesWorkload

SUITE = "many-classes"

# A pass over the rows takes minutes under the first two, seconds under a tree.
_EPOCHS = {"full": 1, "adaptive": 2, "hierarchical": 40}
_MOST_BYTES = 4 * 2**30


def run(session: Session) -> None:
    """Fits the table under every head, and says what memory that took.

    Args:
      session: where the results go.
    """
    chosen = workloads.select(
        workloads.MANY_CLASSES,
        session.workloads,
        platform=session.platform,
        quick=session.quick,
    )
    if not chosen:
        return
    session.measure("copy", "matmul float32")
    for workload in chosen:
        for head, epochs in _EPOCHS.items():
            run_head(session, workload, head, 1 if session.quick else epochs)
    session.save()


def run_head(
    session: Session, workload: ManyClassesWorkload, head: str, epochs: int
) -> None:
    """Fits a table under one head.

    Args:
      session: where the result goes.
      workload: the table.
      head: of the estimator.
      epochs: passes over the rows.
    """
    asked = json.dumps({"name": workload.name, "quick": session.quick})
    command = [sys.executable, "-m", "benchmarks.many_classes", asked, head]
    done = subprocess.run(
        [*command, str(epochs)], capture_output=True, text=True, check=False
    )
    shape = {"n": workload.rows, "d": workload.features, "V": workload.classes}
    case, name = f"{head} head, {epochs} epochs", f"{peers.OURS}, {head}"
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        session.add(
            Result(SUITE, workload.name, shape, case, name, "failed", reason, ours=True)
        )
        return
    figures = json.loads(done.stdout.splitlines()[-1])
    # A fit that learned nothing times nothing.
    learned = session.quick or figures["test log-loss"] < 0.9 * np.log(workload.classes)
    rows = workload.rows * workload.features
    session.add(
        Result(
            SUITE,
            workload.name,
            shape,
            case,
            name,
            "timed" if learned else "wrong",
            "" if learned else f"the log-loss is {figures['test log-loss']:.2f}",
            timing=Timing.of([figures["seconds an epoch"]]),
            work=Work(flops=6 * rows * workload.classes) if head == "full" else None,
            figures=figures,
            ours=True,
        )
    )
    session.findings.append(
        Finding(
            SUITE,
            f"{head} head: peak of resident memory, MiB",
            figures["peak bytes"] / 2**20,
            at_most=None if session.quick else _MOST_BYTES / 2**20,
        )
    )


def _fit(workload: ManyClassesWorkload, head: Any, epochs: int) -> dict[str, float]:
    """Fits the table in this process, and returns the figures of the fit."""
    from sklearn.exceptions import ConvergenceWarning

    from jaxsoft.training import SoftmaxRegression

    features, labels, held, held_labels = workload.table()
    model = SoftmaxRegression(head=head, solver="minibatch", max_iter=epochs)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    seconds = time.perf_counter() - start
    right, loss = [], []
    for at in range(0, len(held), 256):
        log_p = model.predict_log_proba(held[at : at + 256])
        truth = held_labels[at : at + 256]
        right.append(log_p.argmax(1) == truth)
        loss.append(-log_p[np.arange(len(truth)), truth])
    return {
        "epochs": float(epochs),
        "seconds an epoch": seconds / epochs,
        "peak bytes": _peak_bytes(),
        "test accuracy": float(np.concatenate(right).mean()),
        "test log-loss": float(np.concatenate(loss).mean()),
    }


def _peak_bytes() -> float:
    """Returns the most resident memory that this process has had."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # What `getrusage` gives counts the process that started this one, too.
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return 1024.0 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _main(asked: str, head: str, epochs: str) -> None:
    options: dict[str, Any] = json.loads(asked)
    (workload,) = (w for w in workloads.MANY_CLASSES if w.name == options["name"])
    if options["quick"]:
        workload = workload.quick()
    print(json.dumps(_fit(workload, head, int(epochs))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
