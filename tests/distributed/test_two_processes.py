"""A mesh that two real processes share, with `jax.distributed` between them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("two_processes.py")
SECONDS = 600


def _free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def _start(port, number, log):
    """Starts a process that writes all it says into a file: no pipe can fill up."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", SCRIPT, str(port), str(number)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            # One would read programs that the other is writing.
            "JAX_ENABLE_COMPILATION_CACHE": "0",
            "JAX_NUMPY_DTYPE_PROMOTION": "strict",
            "JAX_NUMPY_RANK_PROMOTION": "raise",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *sys.path]),
        },
    )


def _wait(processes):
    """Waits for all, or until one fails or time is over: then ends the others."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()
    return [process.returncode for process in processes]


def test_loss_gradients_and_samples_are_those_of_one_process(tmp_path):
    port = _free_port()
    logs = [tmp_path / f"process{number}.log" for number in range(2)]
    processes = []
    for number, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(_start(port, number, file))
    codes = _wait(processes)
    said = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(said)
    for text in said:
        assert text.count("right: within") == 5, text
        assert text.count("right: across") == text.count("right: explicit") == 7, text
