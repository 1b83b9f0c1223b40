"""The command line: which cases are run, in what order, and where their rows go."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import machine, report, results, table
from bench.cases import CASES, DTYPES, GROUPS, MODES, Case, select
from bench.memory import peak_memory_mib
from bench.providers import OURS, PEER, PROVIDERS, algorithm, build, draw
from bench.results import Row
from bench.timing import Samples, interleave, percentile
from bench.verify import Mismatch, Verdict, check

BACKENDS = ("auto", "numba", "torch", "reference")
QUICK_RESULTS = Path("out/bench")


@dataclass(frozen=True)
class Effort:
    """How long a row may take."""

    min_pairs: int
    budget_s: float
    memory: bool


FULL = Effort(min_pairs=7, budget_s=6.0, memory=True)
QUICK = Effort(min_pairs=5, budget_s=1.5, memory=False)


def parser() -> argparse.ArgumentParser:
    """The arguments of ``python -m bench``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times lstmcore.LSTM against torch.nn.LSTM, alternating, on cases whose outputs and gradients were "
        "just checked. The full run takes about half an hour and updates bench/results/; --quick takes minutes and "
        "writes to out/. Ctrl-C keeps what has been measured.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("run", "report"),
        default="run",
        help="run the cases (default), or rewrite the README's table and the plots from bench/results/",
    )
    parser.add_argument("--quick", action="store_true", help="a subset of the cases, fewer repetitions")
    parser.add_argument("--group", choices=GROUPS, help="only the cases of this group")
    parser.add_argument(
        "--case", metavar="PATTERN", help="only cases whose name matches or contains this, e.g. 'dense-h128-*'"
    )
    parser.add_argument("--mode", choices=MODES, help="only this mode")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="the backend of lstmcore (default: %(default)s); rows of a named one are shown, not saved",
    )
    parser.add_argument("--no-save", action="store_true", help="show the rows, write no file")
    parser.add_argument("--list", action="store_true", help="show the cases and stop")
    return parser


def screen() -> Console:
    """The console; wide enough for the tables where the output is a file or a pipe, which have no width."""
    return Console() if sys.stdout.isatty() else Console(width=150)


def measure(case: Case, modes: Sequence[str], backend: str, effort: Effort) -> dict[str, tuple[Verdict, Samples]]:
    """Checks a case, then times its modes."""
    problem = draw(case)
    ours, peer = build(OURS, problem, backend), build(PEER, problem)
    verdicts = check(problem, ours, peer, modes)
    return {
        mode: (
            verdicts[mode],
            interleave(getattr(ours, mode), getattr(peer, mode), min_pairs=effort.min_pairs, budget_s=effort.budget_s),
        )
        for mode in modes
    }


def rows_of(case: Case, mode: str, verdict: Verdict, samples: Samples, backend: str, peak: float) -> list[Row]:
    """The two rows of a case in a mode."""
    rows = []
    for provider, seconds in ((OURS, samples.ours), (PEER, samples.peer)):
        mine = provider == OURS
        p20, p50, p80 = (percentile(seconds, share) * 1e3 for share in (0.2, 0.5, 0.8))
        gflops = case.flops(mode) / p50 / 1e6
        rows.append(
            Row(
                commit=machine.commit(),
                date=machine.today(),
                **machine.versions(),
                device=machine.device_name(),
                threads=torch.get_num_threads(),
                case=case.name,
                group=case.group,
                input_size=case.input_size,
                hidden_size=case.hidden_size,
                batch=case.batch,
                steps=case.steps,
                num_layers=case.num_layers,
                directions=case.directions,
                proj_size=case.proj_size,
                mean_length=case.mean_length,
                dtype=case.dtype,
                mode=mode,
                provider=provider,
                backend=algorithm(provider, case, mode, backend),
                pairs=len(seconds),
                p20_ms=p20,
                p50_ms=p50,
                p80_ms=p80,
                gflops=gflops,
                peak_gflops=peak,
                peak_share=gflops / peak,
                ratio=samples.ratio if mine else None,
                pair_ratio=samples.pair_ratio if mine else None,
                max_error=verdict.max_error if mine else None,
                reference=verdict.reference if mine else None,
                memory_mib=None,
            )
        )
    return rows


def with_memory(case: Case, rows: list[Row], backend: str) -> list[Row]:
    """The rows with the peak memory of a training step filled in."""
    memory = {provider: peak_memory_mib(case, provider, backend) for provider in PROVIDERS}
    return [replace(row, memory_mib=memory[row.provider]) if row.mode == "training" else row for row in rows]


def fma_peaks(dtypes: Sequence[str]) -> dict[str, float]:
    """What the machine's FMA units do at most, by dtype: GF/s with all threads.

    There is no float16 arithmetic in the kernels, which compute it in float32; so that is its limit too.
    """
    from lstmcore.kernels.numba_peak import fma_peak

    threads = torch.get_num_threads()
    return {
        name: fma_peak(torch.float32 if name == "float16" else DTYPES[name], threads) for name in dict.fromkeys(dtypes)
    }


def run(cases: Sequence[Case], mode: str | None, backend: str, effort: Effort, path: Path | None) -> int:
    """Measures the cases, saving after each; returns the exit status."""
    console = screen()
    threads = torch.get_num_threads()
    console.print(f"{machine.device_name()}, {threads} threads, torch {torch.__version__}")
    peaks = fma_peaks([case.dtype for case in cases])
    console.print("FMA peak: " + ", ".join(f"{name} {peak:.0f} GF/s" for name, peak in peaks.items()))

    rows: list[Row] = []
    failures: list[str] = []
    status = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=case.name)
                modes = [one for one in case.modes if mode in (None, one)]
                try:
                    timed = measure(case, modes, backend, effort)
                except Mismatch as mismatch:
                    failures.append(str(mismatch))
                    progress.console.print(f"[red]wrong result, no figure:[/] {mismatch}")
                else:
                    new = []
                    for one, (verdict, samples) in timed.items():
                        new += rows_of(case, one, verdict, samples, backend, peaks[case.dtype])
                    if effort.memory and case.memory and "training" in modes:
                        new = with_memory(case, new, backend)
                    rows += new
                    if path is not None:
                        results.write(path, results.merge(results.read(path), new, CASES))
                progress.advance(task)
    except KeyboardInterrupt:
        console.print("[yellow]interrupted:[/] what follows is what has been measured so far")
        status = 130

    if rows:
        table.show_rows(console, rows)
        if path is not None:
            console.print(f"rows: {path}")
    for failure in failures:
        console.print(f"[red]wrong result:[/] {failure}")
    return status or (1 if failures else 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m bench``."""
    options = parser().parse_args(arguments)
    if options.command == "report":
        report.update()
        return 0
    cases = select(options.group, options.case, options.quick)
    if not cases:
        chosen = {"--group": options.group, "--case": options.case, "--quick": options.quick}
        given = " ".join(f"{name} {value}" for name, value in chosen.items() if value).replace(" True", "")
        print(f"no case matches {given}; see --list", file=sys.stderr)
        return 2
    if options.list:
        table.show_cases(screen(), cases)
        return 0
    path = None
    if not options.no_save and options.backend == "auto":
        folder = QUICK_RESULTS if options.quick else results.RESULTS
        path = folder / f"{machine.slug(machine.device_name(), torch.get_num_threads())}.csv"
    return run(cases, options.mode, options.backend, QUICK if options.quick else FULL, path)
