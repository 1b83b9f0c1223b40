"""torchrun, as users start it, with a hard limit; its ports are free ones, so that several can run at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 200.0  # seconds: an import of torch in each process, and what else runs on the machine


def start(processes: int, *program: object) -> subprocess.Popen[str]:
    """Starts ``program``, a file and its arguments, in so many processes, in a group of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # torchrun's own choice, which it would warn of
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What it has printed; whatever hangs is killed, with all of its group, and fails the test."""
    try:
        return process.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hung for {LIMIT:.0f} s\n{process.communicate()[0]}")


def torchrun(processes: int, *program: object) -> str:
    """Runs ``program`` to its end, which has to be a good one; returns what it has printed."""
    process = start(processes, *program)
    output = ended(process)
    assert process.returncode == 0, output
    return output
