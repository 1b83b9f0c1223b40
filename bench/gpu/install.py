"""The package, installed from this checkout where Python would not find it: ``python -m bench.gpu.install``.

Nothing but Python's own library is imported: without the package, the benchmark's command line is not importable, so
``python -m bench gpu`` asks here first.  It needs no network: nothing is downloaded, and no dependency is touched.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", str(ROOT))
PROBE = "import lstmcore.kernels; print(lstmcore.kernels.__path__[0])"  # the part that the root alone does not have


def found() -> str | None:
    """Why a fresh Python does not find the package in this checkout; None if it does."""
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["it cannot be imported"])[-1]
    place = Path(done.stdout.strip()).resolve()
    return None if place == (ROOT / "kernels").resolve() else f"lstmcore.kernels is that of {place}"


def run(dry_run: bool = False) -> int:
    """0 if the package is there, or has been installed; pip's status otherwise.

    ``dry_run``: only says what it would do.
    """
    if (why := found()) is None:
        print("lstmcore is importable from this checkout: nothing to install", flush=True)
        return 0
    print(f"{why}: {'would run' if dry_run else 'runs'} {' '.join(PIP)}", flush=True)
    if dry_run:
        return 0
    if status := subprocess.run(PIP, cwd=ROOT, check=False).returncode:
        print(f"not installed: pip ended with status {status}")
        return status
    why = found()
    print("lstmcore was installed from this checkout" if why is None else f"not installed: {why}")
    return 0 if why is None else 1


def first(arguments: Sequence[str]) -> None:
    """What comes before ``python -m bench gpu``: ends in a Python that finds the package, or says why there is none."""
    if found() is None:
        return
    dry = "--dry-run" in arguments
    if status := run(dry):
        sys.exit(status)
    if dry:
        print("the other stages need it, even in a dry run")
        sys.exit(2)
    os.execv(sys.executable, [sys.executable, "-m", "bench", *arguments])  # what is installed now this one does not see


if __name__ == "__main__":
    sys.exit(run(dry_run="--dry-run" in sys.argv[1:]))
