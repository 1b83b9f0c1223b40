"""``tune``: times our kernels beside torch's LSTM on this machine, for ``"auto"`` to go by."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from lstmcore import backends, direct
from lstmcore.backends import machine, tuning
from lstmcore.backends.timings import Timing
from lstmcore.backends.tuning import Table
from lstmcore.cli import facts, trials
from lstmcore.cli.trials import Trial
from lstmcore.kernels.cpu import threads
from lstmcore.tables import table as plain_table

LIMIT_S = {"cpu": 180.0, "cuda": 120.0}
INTERRUPTED = 130  # the status of a program that Ctrl-C ends
STDOUT = "-"
NOISY = 0.2  # relative; with more, another program was at work, and the timing is not kept


def _noisy(timing: Timing) -> bool:
    return timing.right and timing.noise > NOISY


class Outcome(NamedTuple):
    """What a run has found."""

    timings: list[Timing]
    skipped: list[str]  # our kernels do not run these, or there is not enough memory: that is no fault
    failed: list[str]
    left: int  # for which there was no time
    interrupted: bool = False

    @property
    def kept(self) -> list[Timing]:
        """What "auto" is to go by: not what is too noisy, except that it was wrong."""
        return [each for each in self.timings if not _noisy(each)]

    @property
    def status(self) -> int:
        if self.interrupted:
            return INTERRUPTED
        return int(bool(self.failed) or not all(each.right for each in self.timings))


def tune(arguments: argparse.Namespace) -> int:
    """Times ours and torch's by class of shape, and keeps the result for ``"auto"``."""
    device = _device(arguments.device)
    fused = _fused(device)
    arithmetics = _arithmetics(arguments.dtype, device)
    _check_export(arguments.export)
    to = sys.stderr if arguments.export == STDOUT else sys.stdout
    with ExitStack() as stack:
        if arguments.threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(arguments.threads)
        if arguments.show:
            return _shown(_kept(device)[0], arguments.export, to)
        keeps = _lock(stack, arguments.export)
        kept, path = _kept(device)  # now that nobody else writes
        wanted = trials.trials(device.type, arithmetics, arguments.quick)
        have = {(each.cls, each.hidden, each.batch) for each in kept.timings}
        wanted.sort(key=lambda trial: tuple(trial) in have)  # what was left out the last time comes first
        limit = arguments.limit_s or LIMIT_S[device.type]
        print(f"{kept.device}: {len(wanted)} shapes, {limit:g} s at most", file=to)
        outcome = _run(wanted, fused, device, trials.QUICK if arguments.quick else trials.EFFORT, limit)
        _report(outcome, to)
        table = kept.with_timings(outcome.kept)
        try:
            if keeps and outcome.kept:
                _keep(table, path, to)
        finally:  # a disk that is full must not cost what can go elsewhere
            if table.timings:
                _export(table, arguments.export, to)
    return outcome.status


# What was asked for


def _device(text: str | None) -> torch.device:
    device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _fused(device: torch.device) -> str:
    """The name of the backend of our kernels for a device; ValueError or ImportError if there is none."""
    for name, backend in backends.REGISTRY.items():
        if backend.fused and backend.device == device.type:
            backends.load(name)
            return name
    raise ValueError(f"there are no kernels for {device.type!r}, so nothing to choose: expected --device cpu or cuda")


def _arithmetics(asked: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    if asked and "tf32" in asked and device.type != "cuda":
        raise ValueError("--dtype tf32 is float32 on a GPU as torch has it by default: on the CPU use --dtype float32")
    return tuple(dict.fromkeys(asked)) if asked else trials.GRIDS[device.type].arithmetics


def _check_export(export: str | None) -> None:
    """Raises ValueError for a place that cannot take a file, before anything is timed."""
    if export in (None, STDOUT):
        return
    path = Path(export or "")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--export {export}: expected the path of a file in a directory that exists, or - for stdout")


def _kept(device: torch.device) -> tuple[Table, Path]:
    """What was tuned here before, for this device and these versions (of nothing, if there is none), and its file."""
    this, versions = machine.device(device, threads.count()), machine.versions(device.type)
    path = tuning.path_of(this, versions)
    empty = Table(this, versions, ())
    try:
        found = tuning.read(path)
    except (OSError, ValueError):  # none, or not in order: info says so, and it is written anew
        return empty, path
    return (found if found[:2] == empty[:2] else empty), path


def _lock(stack: ExitStack, export: str | None) -> bool:
    """Whether the result can be kept; RuntimeError if not, and it is not exported either, or if another tuning runs."""
    try:
        stack.enter_context(tuning.locked())
    except OSError as error:
        if export is None:
            raise RuntimeError(
                f"nothing can be kept beside the compiled kernels ({error}), so nothing was timed: make that directory "
                "writable, set XDG_CACHE_HOME to another one, or use --export FILE"
            ) from None
        return False
    return True


# The run


def _run(wanted: Sequence[Trial], fused: str, device: torch.device, effort: trials.Effort, limit_s: float) -> Outcome:
    outcome = Outcome([], [], [], 0)
    started = time.monotonic()
    with _progress(len(wanted)) as say, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections")  # torch's, on its own slow path
        for done, trial in enumerate(wanted):
            if time.monotonic() - started >= limit_s:
                return outcome._replace(left=len(wanted) - done)
            try:
                say(_one(trial, fused, device, effort, outcome))
            except KeyboardInterrupt:
                return outcome._replace(left=len(wanted) - done, interrupted=True)
    return outcome


def _one(trial: Trial, fused: str, device: torch.device, effort: trials.Effort, outcome: Outcome) -> str:
    """Adds what was found of one shape to the outcome; returns it as a line."""
    try:
        backends.choose(fused, (trial.layer(device, trials.GRIDS[device.type].short),))
    except RuntimeError as error:  # our kernels say why they do not run it
        outcome.skipped.append(f"{trial}: {error}")
        return outcome.skipped[-1]
    try:
        timing = trials.run(trial, fused, device, effort)
    except torch.OutOfMemoryError:
        outcome.skipped.append(f"{trial}: there is not enough memory")
        return outcome.skipped[-1]
    except Exception as error:  # one shape that fails must not lose what was found of the others
        first = (str(error).strip() or "no message").splitlines()[0]
        outcome.failed.append(f"{trial}: {type(error).__name__}: {first}")
        return outcome.failed[-1]
    outcome.timings.append(timing)
    return f"{trial}: {timing.ratio(timing.long):.2f}x" if timing.right else f"{trial}: WRONG"


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """What shows on stderr how far it is, with the last line: a bar where rich is installed, else line by line."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress
    except ImportError:
        yield lambda line: print(line, file=sys.stderr)
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("ours beside torch's", total=total)
        yield lambda line: bar.update(task, advance=1, description=escape(line))


# What is shown of it


def _rows(timings: Sequence[Timing]) -> str:
    lines = []
    for each in sorted(timings):
        taken = "no: WRONG" if not each.right else "not kept: noisy" if _noisy(each) else str(each.span or "no")
        lines.append(
            (
                *each.cls,
                str(each.hidden),
                str(each.batch),
                str(each.long),
                f"{each.ours_long_ms:.3g}",
                f"{each.torch_long_ms:.3g}",
                f"{each.ratio(each.long):.2f}",
                f"{100 * each.noise:.0f} %",
                taken,
            )
        )
    header = ("kind", "arithmetic", "mode", "H", "B", "T", "ours ms", "torch ms", "ratio", "noise", "taken")
    return plain_table(header, lines)


def _report(outcome: Outcome, to: TextIO) -> None:
    if outcome.timings:
        print(f"\n{_rows(outcome.timings)}\n", file=to)
    for each in (*outcome.skipped, *(f"FAILED: {line}" for line in outcome.failed)):
        print(each, file=to)
    if wrong := sum(not each.right for each in outcome.timings):
        print(f"FAILED: {wrong} shapes have wrong results and are never taken; run python -m lstmcore check", file=to)
    if noisy := len(outcome.timings) - len(outcome.kept):
        many = f"{noisy} shapes have a noise of more than {100 * NOISY:.0f} % and are not kept"
        print(f"{many}: run it again when nothing else runs", file=to)
    why = "interrupted" if outcome.interrupted else "no time was left: run it again, or with a larger --limit-s"
    if outcome.left:
        print(f"{outcome.left} shapes were left out ({why})", file=to)


def _keep(table: Table, path: Path, to: TextIO) -> None:
    tuning.write(table, path)
    backends.forget()
    direct.forget()
    print(f'{len(table.timings)} shapes kept in {facts.private(str(path))}; "auto" goes by them', file=to)


def _shown(kept: Table, export: str | None, to: TextIO) -> int:
    """Shows, and exports, what is kept, without timing anything."""
    if not kept.timings:
        raise RuntimeError(f"nothing is kept of {kept.device} with these versions: {tuning.COMMAND}")
    print(f"{kept.device}, last on {kept.date}\n\n{_rows(kept.timings)}", file=to)
    _export(kept, export, to)
    return 0


def _export(table: Table, export: str | None, to: TextIO) -> None:
    if export is None:
        return
    if export == STDOUT:
        sys.stdout.write(tuning.to_text(table))
        return
    Path(export).write_text(tuning.to_text(table))
    print(
        f"{len(table.timings)} shapes exported; in the package it is {tuning.COMMITTED.name}/{table.device.slug}.csv",
        file=to,
    )
