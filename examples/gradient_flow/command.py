"""The options of the demonstration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from common import positive


def parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Show which gradients survive long sequences, and which models learn from them, in pictures.",
    )
    lengths: dict[str, Any] = {"type": positive, "nargs": "*", "metavar": "T"}
    add = parser.add_argument
    add("--out", default="out/flow", metavar="FOLDER", help="where it all goes (default: %(default)s)")
    add("--steps", type=positive, default=2000, metavar="T", help="steps of the untrained pass (default: %(default)s)")
    add("--adding", **lengths, default=[100, 400], help="lengths of the adding problem to train on (default: 100 400)")
    add("--copy", **lengths, default=[200], help="delays of the copy problem to train on (default: 200)")
    add("--hidden-size", type=positive, metavar="H", help="hidden units (default: 32 adding, 64 copy)")
    add("--iterations", type=positive, metavar="N", help="of a training, at most (default: 800 or 1000)")
    add("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    add("--minutes", type=float, default=5, help="the most that it may take (default: %(default)s)")
    add("--quick", action="store_true", help="a few iterations of each training, to see that it works")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python examples/gradient_flow") -> int:
    """Runs the demonstration; returns the exit status: 0, 130 after Ctrl-C, 2 for what cannot be done."""
    options = parser(prog).parse_args(arguments)
    try:
        from gradient_flow.demo import demo
    except ImportError as error:
        print(f"{prog}: needs rich and matplotlib: pip install rich matplotlib ({error})", file=sys.stderr)
        return 2
    try:
        return demo(options)
    except OSError as error:  # a folder that cannot be written to
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
