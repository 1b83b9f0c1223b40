"""The one command line: ``python -m bench``, and what stands behind each of its words."""

from __future__ import annotations

import argparse
import os
import pkgutil
import sys
from collections.abc import Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from bench import machine, rows, session, tables
from bench.cases import CASES, GROUPS, MODES, Case, select
from bench.experiments import EXPERIMENTS, MAIN
from bench.measure import NO_GPU, Experiment, Task
from bench.timing import Effort
from lstmcore.backends import names

QUICK_RESULTS, GPU_RESULTS = Path("out/bench"), Path("out/gpu")
DESCRIPTION = """\
Times lstmcore.LSTM against torch.nn.LSTM by turns, on cases whose outputs and gradients were just checked: each call
behind an operation of torch's, as in a model, and alone, then also against onnxruntime where it is installed and covers
the case; in bfloat16 also ours against ours in float32. That is what happens without a command; the full run takes
about three quarters of an hour. Ctrl-C keeps what has been measured."""
# Beside the experiments: a sentence each, and the function that does it, imported when it is wanted.
COMMANDS = {
    "gpu": ("all that a visit to a machine with a CUDA GPU is for: what make gpu runs", "bench.gpu.visit:run"),
    "smoke": ("each design of the GPU kernels once, against torch's LSTM", "bench.gpu.smoke:run"),
    "streams": ("layers of different designs on two CUDA streams at once, checked and timed", "bench.gpu.streams:run"),
    "compile": ("compiles the GPU kernels of the quick benchmark on all processors", "bench.gpu.compile:run"),
    "environment": ("device, driver and versions", "bench.gpu.environment:run"),
    "kernels": ("compiles every GPU kernel, without a GPU, and reports on its code", "bench.gpu.kernels:run"),
    "scaling": ("what the model of the CPU kernels predicts of more threads", "bench.experiments.scaling:run"),
    "rounding": ("how far results in 16 bits are off, ours and torch's, against float64", "bench.rounding:run"),
    "report": (
        "rewrites README's table, docs/benchmarks.md, the plots and build/report.html from bench/results",
        "bench.report:run",
    ),
    "compare": ("times two commits side by side; fails where the second is slower or larger", "bench.compare:run"),
}


def _positive(text: str) -> int:
    """The type of an argument that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _common() -> argparse.ArgumentParser:
    """The options of everything that measures cases; one that is not given leaves no trace, see ``DEFAULTS``."""
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    which = common.add_argument_group("which cases")
    which.add_argument("--quick", action="store_true", help="a subset of the cases, fewer repetitions")
    which.add_argument("--device", choices=("cpu", "cuda"), help="where (default: cpu, if the command measures there)")
    which.add_argument("--group", choices=GROUPS, metavar="GROUP", help="only the cases of this group; see --list")
    which.add_argument(
        "--case", metavar="PATTERN", help="only cases whose name matches or contains this, e.g. 'dense-h128-*'"
    )
    which.add_argument("--mode", choices=MODES, help="only this mode")
    which.add_argument("--after", metavar="CASE", help="only the cases that come after this one")
    which.add_argument("--list", "--dry-run", dest="list", action="store_true", help="show the cases and stop")
    how = common.add_argument_group("how")
    how.add_argument(
        "--backend",
        choices=names(),
        help="the backend of lstmcore (default: what the command is about, mostly auto); on a CPU, rows of one named "
        "here are shown, not saved",
    )
    how.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="on a CPU: how many threads torch has, and so all (default: torch's choice); each number has its own file",
    )
    how.add_argument("--pairs", type=_positive, metavar="N", help="measure a pair at least so often")
    how.add_argument("--seconds", type=float, metavar="S", help="go on with a pair for so long")
    how.add_argument("--limit-s", type=float, metavar="S", help="start no case that would end later than this")
    how.add_argument(
        "--slow", action="store_true", help="control: also torch's packed training, where it takes minutes"
    )
    where = common.add_argument_group("where the rows go")
    where.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: bench/results, and out/bench where --quick, --pairs or --seconds make less of it",
    )
    where.add_argument("--commit", metavar="HASH", help="what was measured, where git cannot tell")
    where.add_argument("--no-save", action="store_true", help="show the rows, write no file")
    return common


DEFAULTS: dict[str, Any] = dict.fromkeys(
    ("device", "group", "case", "mode", "after", "backend", "threads", "pairs", "seconds", "limit_s", "out", "commit")
) | dict.fromkeys(("quick", "list", "slow", "no_save"), False)


def parser() -> argparse.ArgumentParser:
    """All arguments."""
    common = _common()
    top = argparse.ArgumentParser(prog="python -m bench", description=DESCRIPTION, parents=[common])
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, experiment in EXPERIMENTS.items():
        details = "; ".join(f"{column}: {meaning}" for column, meaning in experiment.details.items())
        epilog = f"Of its rows, times are of {experiment.times}. {f'Details: {details}.' if details else ''}"
        commands.add_parser(name, parents=[common], help=experiment.what, description=experiment.what, epilog=epilog)
    own = {name: commands.add_parser(name, help=what, description=what) for name, (what, _) in COMMANDS.items()}
    stages = own["gpu"].add_argument
    stages("--stage", action="append", metavar="STAGE", help="only this one; repeatable; --dry-run names them all")
    stages("--minutes", type=float, default=10.0, help="for everything together (default: %(default)g)")
    stages("--out", type=Path, default=GPU_RESULTS, metavar="DIR", help="default: %(default)s")
    stages("--commit", metavar="HASH", help="what is measured, where git cannot tell")
    stages("--dry-run", action="store_true", help="run what needs no GPU, and say what would run")
    small = own["smoke"].add_argument
    small("--unchecked", action="store_true", help="run in one process, and compare nothing")
    small("--case", metavar="PATTERN", help="only cases whose name matches or contains this, in one process")
    small("--limit-s", type=float, default=60.0, metavar="S", help="for a process (default: %(default)g)")
    own["streams"].add_argument("--limit-s", type=float, default=120.0, metavar="S", help="default: %(default)g")
    for name in ("smoke", "streams"):
        own[name].add_argument("--dry-run", action="store_true", help="on the CPU, by Triton's interpreter; no time")
    own["compile"].add_argument("--limit-s", type=float, default=90.0, metavar="S", help="default: %(default)g")
    kernels = own["kernels"].add_argument
    kernels("--target", type=int, action="append", choices=(80, 89, 90, 100), help="compute capability; default: all")
    kernels("--quick", action="store_true", help="a few configurations, as the tests run them")
    kernels("--workers", type=int, default=os.cpu_count(), help="processes that compile (default: %(default)s)")
    kernels("--csv", type=Path, help="also write the rows here")
    kernels("--json", action="store_true", help="print the rows as JSON, and no table")
    rounding = own["rounding"].add_argument
    rounding("--case", metavar="PATTERN", help="only cases whose name matches or contains this")
    rounding("--threads", type=_positive, metavar="N", help="of torch, and so of all (default: torch's choice)")
    rounding("--out", type=Path, metavar="DIR", help="where the rows go (default: bench/results/rounding)")
    rounding("--no-save", action="store_true", help="write no file")
    own["report"].add_argument("--out", type=Path, metavar="DIR", help="only draw the plots of the rows in this folder")
    compare = own["compare"].add_argument
    for name in ("a", "b"):
        compare(name, metavar=name.upper(), help="what git calls a commit; . is the tree with its changes")
    compare("--case", metavar="PATTERN", help="of all cases on a CPU those that match, in place of the few")
    compare("--rounds", type=_positive, default=3, help="fresh processes of each (default: %(default)s)")
    compare("--samples", type=_positive, default=7, help="of each call in a process (default: %(default)s)")
    compare("--threads", type=_positive, metavar="N", help="of torch, and so of all (default: torch's choice)")
    compare("--no-memory", action="store_true", help="only times")
    return top


def chosen(options: argparse.Namespace, work: Sequence[Experiment], device: str) -> list[Case] | None:
    """The cases that were asked for; None, and a word on it, where there are none."""
    name = work[0].name
    every = select(name, device)
    if options.after is not None and options.after not in {case.name for case in every}:
        print(f"expected the name of a case on {device} for --after, got {options.after!r}", file=sys.stderr)
        return None
    cases = select(name, device, options.group, options.case, options.quick)
    if options.after is not None:
        order = list(CASES)
        cases = [case for case in cases if order.index(case.name) > order.index(options.after)]
    if not cases:
        asked = {f"--{key}": getattr(options, key) for key in ("device", "group", "case", "quick", "after")}
        given = " ".join(f"{option} {value}" for option, value in asked.items() if value).replace(" True", "")
        print(f"no case matches {given}; see --list", file=sys.stderr)
        return None
    return cases


def efforts(options: argparse.Namespace, work: Sequence[Experiment], device: str) -> list[tuple[Experiment, Task]]:
    """Each experiment with what is wanted of it: of a second figure less."""
    result: list[tuple[Experiment, Task]] = []
    for experiment in work:
        effort = (experiment.quick if options.quick and experiment.quick else experiment.full)[device]
        if options.pairs is not None or options.seconds is not None:
            seconds = effort.budget_s if options.seconds is None else options.seconds
            effort = Effort(options.pairs or effort.min_pairs, seconds, effort.memory)
        backend = options.backend or experiment.backend.get(device, "auto")
        result.append((experiment, Task(effort.less if result else effort, backend, options.mode, options.slow)))
    return result


def measure(options: argparse.Namespace) -> int:
    """An experiment, or without a command the main ones."""
    options = argparse.Namespace(**DEFAULTS | vars(options))
    own = EXPERIMENTS[options.command] if options.command else None
    device = options.device or ("cpu" if own is None or "cpu" in own.full else "cuda")
    work = MAIN[device] if own is None else (own,)
    if device not in work[0].full:
        print(f"{work[0].name} measures on {', '.join(work[0].full)}, not on {device}", file=sys.stderr)
        return 2
    if options.threads is not None:
        if device != "cpu":
            print("--threads is for a CPU: a GPU is always used as a whole", file=sys.stderr)
            return 2
        torch.set_num_threads(options.threads)
    if (cases := chosen(options, work, device)) is None:
        return 2
    tasks = efforts(options, work, device)
    if options.list:
        experiment, task = tasks[0]
        if experiment.plan is not None:
            print("\n".join(line for case in cases for line in experiment.plan(case)))
        else:
            seconds, of = partial(experiment.seconds, effort=task.effort), len(select(experiment.name, device))
            tables.show_cases(session.screen(), cases, of, seconds, options.quick)
        return 0
    if device == "cuda" and not torch.cuda.is_available():
        print(f"{NO_GPU}; --list shows the cases, and what each would cost", file=sys.stderr)
        return 2
    path = None
    if not options.no_save and (options.backend in (None, "auto") or device == "cuda"):
        less = options.quick or options.pairs is not None or options.seconds is not None
        folder = options.out or (QUICK_RESULTS if less else rows.RESULTS)
        path = folder / f"{machine.slug(device)}.csv"
    return session.Session(tasks, path, options.limit_s, options.commit).run(cases)


def other(command: str, **options: Any) -> int:
    """A command beside the experiments."""
    without = options.get("dry_run", False)
    if command in ("smoke", "streams", "compile") and not (without or torch.cuda.is_available()):
        print(NO_GPU, file=sys.stderr)
        return 2
    function = pkgutil.resolve_name(COMMANDS[command][1])
    if surplus := sorted(options.keys() - signature(function).parameters):
        print(f"{command} does not take --{surplus[0].replace('_', '-')}", file=sys.stderr)
        return 2
    return int(function(**options))


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m bench``; the exit status."""
    options = parser().parse_args(arguments)
    return other(**vars(options)) if options.command in COMMANDS else measure(options)
