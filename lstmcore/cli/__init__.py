"""The command line, ``python -m lstmcore``: ``info``, ``prewarm``, ``check``, ``tune`` and ``flow``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lstmcore
from lstmcore import backends
from lstmcore.backends.timings import ARITHMETICS
from lstmcore.cli.options import DTYPES, device, seconds, size
from lstmcore.cli.parity import check
from lstmcore.cli.report import info
from lstmcore.cli.tuning import tune
from lstmcore.cli.warming import prewarm


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failed check, 2 for an error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = 1 if argv[:1] == ["flow"] else len(argv)  # the demonstration parses the rest
    arguments = _parser().parse_args(argv[:end], argparse.Namespace(rest=argv[end:]))
    try:
        return arguments.command(arguments)
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        print(f"lstmcore {arguments.name}: {error}", file=sys.stderr)
        return 2


def flow(arguments: argparse.Namespace) -> int:
    """Runs the demonstration of the gradient flow, which is in a checkout only and has options of its own."""
    examples = Path(lstmcore.__file__).parents[1] / "examples"
    if not (examples / "gradient_flow").is_dir():
        raise RuntimeError(
            "the demonstration is not installed with the package: it is in lstmcore's source, where "
            "`python examples/gradient_flow` runs it"
        )
    sys.path.insert(0, str(examples))
    return importlib.import_module("gradient_flow.command").main(arguments.rest, prog="python -m lstmcore flow")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lstmcore", description=lstmcore.__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=lstmcore.__version__)
    commands = parser.add_subparsers(title="commands", dest="name", required=True, metavar="COMMAND")

    def add(command: Any, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(command.__name__, help=help, description=f"{help[0].upper()}{help[1:]}.")
        added.set_defaults(command=command)
        return added

    what = add(
        info, "show all that a report of a fault needs: versions, machine, threads, cache, which backend runs what"
    )
    what.add_argument("--check", action="store_true", help="also compare a few cases with torch.nn.LSTM, in seconds")
    what.add_argument("--markdown", action="store_true", help="folded, to be pasted into an issue")

    warm = add(prewarm, "compile the kernels that a module of these sizes needs, so that no first call waits")
    warm.add_argument("--input-size", type=size, required=True, metavar="I", help="features of the input")
    warm.add_argument("--hidden-size", type=size, required=True, metavar="H", help="features of the states")
    warm.add_argument("--num-layers", type=size, default=1, metavar="L", help="layers (default: 1)")
    warm.add_argument("--proj-size", type=int, default=0, metavar="P", help="size of the projection (default: none)")
    warm.add_argument("--bidirectional", action="store_true", help="both directions of time")
    warm.add_argument("--no-bias", action="store_true", help="a module without biases")
    warm.add_argument("--batch", type=size, default=32, metavar="B", help="rows of a batch (default: 32)")
    warm.add_argument("--steps", type=size, default=1000, metavar="T", help="steps of a sequence (default: 1000)")
    warm.add_argument("--packed", action="store_true", help="rows of different lengths")
    warm.add_argument("--inference", action="store_true", help="leave out what only training needs")
    warm.add_argument("--stream", action="store_true", help="also what lstmcore.Stream needs (on the CPU)")
    warm.add_argument("--dtype", action="append", choices=DTYPES, help="repeat it for several (default: float32)")
    warm.add_argument("--device", type=device, default="cpu", help="where the module will run (default: cpu)")

    parity = add(check, "compare outputs and all gradients with float64 torch.nn.LSTM on this machine")
    parity.add_argument("--backend", choices=backends.names(), default="auto", help="what to check (default: auto)")
    parity.add_argument("--device", type=device, default="cpu", help="where to check it (default: cpu)")

    timed = add(tune, "time our kernels beside torch's on this machine, and keep what backend='auto' then goes by")
    timed.add_argument("--device", type=device, help="what to time (default: cuda if torch finds a GPU, else cpu)")
    timed.add_argument(
        "--dtype", action="append", choices=ARITHMETICS, help="repeat it for several (default: the usual ones; tf32: "
        "float32 on a GPU as torch has it by default, which float32 is without)",
    )  # fmt: skip
    timed.add_argument("--quick", action="store_true", help="fewer shapes, less exactly")
    timed.add_argument(
        "--limit-s", type=seconds, metavar="S", help="begin no shape after so many seconds (default: 180, GPU: 120)"
    )
    timed.add_argument("--threads", type=size, metavar="N", help="torch's on the CPU (default: as they are set)")
    timed.add_argument("--export", metavar="FILE", help="also write the table, as the package has it; - for stdout")
    timed.add_argument("--show", action="store_true", help="time nothing: show, and export, what is kept")

    add(flow, "show which gradients survive long sequences, and which models learn from them, in pictures")
    return parser
