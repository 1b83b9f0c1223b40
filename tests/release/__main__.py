"""``python -m tests.release``: the two commands behind ``make dist`` and ``make matrix``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from . import dist, matrix
from .cells import CELLS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("dist", help="build wheel and sdist, look inside, and try both in a clean environment")
    across = commands.add_parser("matrix", help="try the wheel, with tests, on the oldest and newest versions")
    names = [cell.name for cell in CELLS]
    across.add_argument("cells", nargs="*", metavar="CELL", help=f"which ones (default: all): {', '.join(names)}")
    across.add_argument("--smoke", action="store_true", help="only the wheel's smoke test, no test suite")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "dist":
            return dist.run()
        if unknown := set(arguments.cells) - {*names}:
            parser.error(f"no cell is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        return matrix.run([cell for cell in CELLS if cell.name in (arguments.cells or names)], arguments.smoke)
    except (dist.Wrong, subprocess.CalledProcessError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
