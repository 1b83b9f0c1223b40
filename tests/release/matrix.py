"""Tries the wheel on the versions of ``cells.py``: the smoke test, the parity check, and the quick tests."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from . import dist
from .cells import NAMES, TOOLS, Cell
from .environments import BUILD, ROOT, Absent, Environment

# Tests of what a user calls, by what the versions have to do with it.  Those of tests/house are about the checkout.
TESTS = ("tests/contract", "tests/module", "tests/torch", "tests/models", "tests/gpu")
HOURS = 2 * 3600.0  # that the tests of a cell may take
COMMAND = ("-m", "pytest", "-q", "-n", "auto", "--dist", "loadgroup", "--max-worker-restart", "0", "-m", "not slow")


class Result(NamedTuple):
    """What came out in a cell."""

    cell: Cell
    outcome: str  # "passed", "FAILED" or "not run"
    versions: dict[str, str]
    detail: str


def _versions(environment: Environment) -> dict[str, str]:
    """What is installed, which a name may leave open: torch says which build."""
    program = (
        "import importlib.metadata as m, platform; print('Python', platform.python_version())\n"
        "for d in m.distributions(): print(d.metadata['Name'].lower(), d.version)"
    )
    return dict(line.split() for line in environment.run("-I", "-c", program).splitlines())


def _tests(environment: Environment, sdist: Path) -> str:
    """Runs the sdist's tests on what is installed, where the package's sources are not; pytest's last line."""
    place = environment.folder / "tests"
    shutil.rmtree(place, ignore_errors=True)
    source = dist.unpack(sdist, place)
    for name in dist.FOLDERS:
        shutil.rmtree(source / name)
    environment.install(*TOOLS)
    output = environment.run(*COMMAND, *TESTS, cwd=source, limit=HOURS)
    return re.sub(r" in [\d.]+s.*", "", output.strip().splitlines()[-1])


def _try(cell: Cell, wheel: Path, sdist: Path | None) -> Result:
    """``sdist``: whose tests to run; None for the smoke test alone."""
    folder, log = BUILD / "matrix" / cell.name, BUILD / "matrix" / f"{cell.name}.log"
    try:
        environment = Environment(folder, cell.python, cell.pins)
    except Absent as error:
        return Result(cell, "not run", {}, str(error))
    versions: dict[str, str] = {}
    try:
        environment.install(wheel)
        environment.install(wheel, fresh=True)  # the version may be the one that is there
        versions = _versions(environment)
        detail = dist.smoke(environment)
        if sdist is not None:
            detail += f"; {_tests(environment, sdist)}"
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        log.write_text(f"{error}\n{error.stdout or error.stderr or ''}")
        return Result(cell, "FAILED", versions, f"{error}; see {log.relative_to(ROOT)}")
    return Result(cell, "passed", versions, re.sub(r"^.*: ok, ", "", detail))


def _show(results: Sequence[Result]) -> None:
    table = Table("cell", "Python", *NAMES, "result", "what", title="matrix")
    for cell, outcome, found, detail in results:
        pins = dict(pin.split("==") for pin in cell.pins)
        versions = [found.get(name) or (pins.get(name, "-") if not found else "-") for name in NAMES]
        table.add_row(cell.name, found.get("Python", cell.python), *versions, outcome, detail)
    Console(width=160).print(table)
    counts = [sum(result.outcome == outcome for result in results) for outcome in ("passed", "FAILED", "not run")]
    print("{} passed, {} failed, {} not run".format(*counts))


def run(cells: Sequence[Cell], quick: bool) -> int:
    """Tries each cell; the status is 1 where one fails, and where none could be run."""
    wheel, sdist = dist.build_all()
    results = []
    for cell in cells:
        start = time.monotonic()
        results.append(_try(cell, wheel, None if quick else sdist))
        print(f"{cell.name} ({cell.why}): {results[-1].outcome}, {time.monotonic() - start:.0f} s", flush=True)
    _show(results)
    outcomes = [result.outcome for result in results]
    return int("FAILED" in outcomes or "passed" not in outcomes)
