"""The command line: which cases are run, in what order, and where their rows go."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import gpu_cases, machine, onnx_peer, report, results, table
from bench.cases import CASES, DTYPES, GROUPS, MODES, Case, select
from bench.gpu_cases import GPU_CASES, GPU_GROUPS
from bench.memory import gpu_peak_mib, peak_memory_mib
from bench.providers import OURS, PEER, PROVIDERS, algorithm, build, draw, precision
from bench.results import Row
from bench.summary import pairs
from bench.timing import CLOCKS, Samples, interleave, operation, percentile
from bench.verify import Mismatch, Verdict, check

BACKENDS = ("auto", "triton", "numba", "torch", "reference")
QUICK_RESULTS = Path("out/bench")
REGISTRIES: Mapping[str, Mapping[str, Case]] = {"cpu": CASES, "cuda": GPU_CASES}
NO_GPU = f"there is no CUDA device: torch {torch.__version__} finds none, so nothing was measured"
# The exit status when a kernel has broken CUDA's context, after which a process can compute nothing more on the GPU;
# and the line that names the case, so that another process can go on after it.
REFUSED = "cannot run this call"  # how lstmcore says that a named backend does not cover a case
LOST, LOST_AT = 3, "the GPU was lost at case "
NOTHING = 77  # the exit status of a command that found nothing to do: what automake's tests use for "skipped"


@dataclass(frozen=True)
class Effort:
    """How long a row may take."""

    min_pairs: int
    budget_s: float
    memory: bool


FULL = {"cpu": Effort(min_pairs=7, budget_s=6.0, memory=True), "cuda": Effort(min_pairs=7, budget_s=1.0, memory=True)}
QUICK = {
    "cpu": Effort(min_pairs=5, budget_s=1.5, memory=False),
    "cuda": Effort(min_pairs=gpu_cases.QUICK_PAIRS, budget_s=gpu_cases.QUICK_S, memory=True),
}


@dataclass(frozen=True)
class Measured:
    """What one mode of a case gave."""

    verdict: Verdict
    samples: Samples
    alone: Samples | None  # on a CPU, where ``samples`` are those behind an operation of torch's
    memory: Mapping[str, float] = field(default_factory=dict)  # MiB by provider, where measured in this process
    onnxruntime: tuple[float, ...] = ()  # seconds a call, alone; none where it does not cover the case, or is missing


def _positive(text: str) -> int:
    """The type of an argument that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def parser() -> argparse.ArgumentParser:
    """The arguments of ``python -m bench``."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times lstmcore.LSTM against torch.nn.LSTM by turns, behind an operation of torch's as in a model, "
        "and alone, on cases whose outputs and gradients were just checked; in dense float32 inference also against "
        "onnxruntime, where it is installed. The full run takes about half an hour and updates bench/results/; --quick "
        "takes minutes and writes to out/. Ctrl-C keeps what has been measured.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("run", "report"),
        default="run",
        help="run the cases (default), or rewrite the README's table and the plots from bench/results/ (with --out: "
        "only draw the plots of that folder)",
    )
    parser.add_argument("--quick", action="store_true", help="a subset of the cases, fewer repetitions")
    parser.add_argument("--device", choices=REGISTRIES, default="cpu", help="where (default: %(default)s)")
    parser.add_argument(
        "--group", choices=[*GROUPS, *GPU_GROUPS], metavar="GROUP", help="only the cases of this group; see --list"
    )
    parser.add_argument(
        "--case", metavar="PATTERN", help="only cases whose name matches or contains this, e.g. 'dense-h128-*'"
    )
    parser.add_argument("--mode", choices=MODES, help="only this mode")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="the backend of lstmcore (default: %(default)s); on a CPU, rows of a named one are shown, not saved",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="on a CPU: how many threads torch has, and so all (default: torch's choice); each number has its own file",
    )
    parser.add_argument("--after", metavar="CASE", help="only the cases that come after this one")
    parser.add_argument(
        "--limit-s", type=float, metavar="SECONDS", help="on a GPU: start no case that would end later than this"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--commit", metavar="HASH", help="what was measured, where git cannot tell")
    parser.add_argument("--no-save", action="store_true", help="show the rows, write no file")
    parser.add_argument("--list", action="store_true", help="show the cases and stop")
    return parser


def screen() -> Console:
    """The console; wide enough for the tables where the output is a file or a pipe, which have no width."""
    return Console() if sys.stdout.isatty() else Console(width=165)


def measure(case: Case, modes: Sequence[str], backend: str, effort: Effort) -> dict[str, Measured]:
    """Checks a case, then times its modes."""
    problem = draw(case)
    ours, peer = build(OURS, problem, backend), build(PEER, problem)
    verdicts = check(problem, ours, peer, modes)
    measured = {}
    on_cpu, alone = case.device == "cpu", None
    for mode in modes:
        calls = getattr(ours, mode), getattr(peer, mode)
        pairs_at_least, budget, clock = effort.min_pairs, effort.budget_s, CLOCKS[case.device]
        few, short = pairs_at_least // 2 + 1, budget / 3
        samples = interleave(
            *calls, min_pairs=pairs_at_least, budget_s=budget, clock=clock, before=operation if on_cpu else None
        )
        if on_cpu:
            alone = interleave(*calls, min_pairs=few, budget_s=short, clock=clock)
        apart: tuple[float, ...] = ()
        if onnx_peer.covers(case, mode) and onnx_peer.missing() is None:
            apart = onnx_peer.seconds(peer.module, problem, peer.inference(), min_samples=few, budget_s=short)
        memory = {}
        if case.device == "cuda" and effort.memory and case.memory and mode == "training":
            memory = {OURS: gpu_peak_mib(ours), PEER: gpu_peak_mib(peer)}
        measured[mode] = Measured(verdicts[mode], samples, alone, memory, apart)
    return measured


def rows_of(case: Case, mode: str, measured: Measured, backend: str, peak: float | None) -> list[Row]:
    """The two rows of a case in a mode."""
    rows = []
    on_gpu = case.device == "cuda"
    samples, alone, verdict = measured.samples, measured.alone, measured.verdict
    apart = median(measured.onnxruntime) if measured.onnxruntime else None
    for provider, seconds in ((OURS, samples.ours), (PEER, samples.peer)):
        mine = provider == OURS
        p20, p50, p80 = (percentile(seconds, share) * 1e3 for share in (0.2, 0.5, 0.8))
        gflops = case.flops(mode) / p50 / 1e6
        rows.append(
            Row(
                commit=machine.commit(),
                date=machine.today(),
                **machine.versions(),
                device=machine.device_name(case.device),
                threads=machine.units(case.device),
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
                peak_share=None if peak is None else gflops / peak,
                ratio=samples.ratio if mine else None,
                pair_ratio=samples.pair_ratio if mine else None,
                max_error=verdict.max_error if mine else None,
                reference=verdict.reference if mine else None,
                memory_mib=measured.memory.get(provider),
                cudnn=machine.cudnn() if on_gpu else None,
                precision=("tf32" if case.tf32 else "ieee") if on_gpu and case.dtype == "float32" else None,
                setting="behind" if alone else "alone",
                alone_ms=median(alone.ours if mine else alone.peer) * 1e3 if alone else None,
                alone_ratio=alone.ratio if mine and alone else None,
                onnxruntime_ms=apart * 1e3 if mine and apart else None,
                onnxruntime_ratio=apart / median(alone.ours) if mine and apart and alone else None,
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
    from lstmcore.kernels.cpu.peak import fma_peak

    threads = torch.get_num_threads()
    return {
        name: fma_peak(torch.float32 if name == "float16" else DTYPES[name], threads) for name in dict.fromkeys(dtypes)
    }


def case_rows(case: Case, mode: str | None, backend: str, effort: Effort, peaks: Mapping[str, float]) -> list[Row]:
    """Everything about one case: checked, timed, its memory measured."""
    modes = [one for one in case.modes if mode in (None, one)]
    rows = []
    with precision(case):
        for one, measured in measure(case, modes, backend, effort).items():
            rows += rows_of(case, one, measured, backend, peaks.get(case.dtype))
    if case.device == "cpu" and effort.memory and case.memory and "training" in modes:
        rows = with_memory(case, rows, backend)
    return rows


def release() -> bool:
    """Gives the GPU's memory back after a case; whether the GPU still answers."""
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:  # torch.AcceleratorError too
        return False
    return True


def _reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _line(rows: Sequence[Row]) -> str:
    """A case in one line, as soon as it is measured: on a GPU, a run may be cut off before its tables."""
    parts = [
        f"{ours.mode} {ours.p50_ms:.4g} ms, {peer.p50_ms / ours.p50_ms:.2f}× ({ours.backend} / {peer.backend})"
        for ours, peer in pairs(rows)
    ]
    return f"{rows[0].case}: {'; '.join(parts)}"


@dataclass
class Log:
    """What a run has to tell at its end, beside its rows."""

    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def show(self, console: Console) -> None:
        for title, lines in (("wrong result", self.wrong), ("failed", self.failed), ("not measured", self.left_out)):
            for line in lines:
                console.print(f"[red]{title}:[/] {escape(line)}")


def run(
    cases: Sequence[Case],
    mode: str | None,
    backend: str,
    effort: Effort,
    path: Path | None,
    limit_s: float | None = None,
    commit: str | None = None,
) -> int:
    """Measures the cases of one device, saving after each; returns the exit status.

    A case that raises is reported, and the next one is run.
    """
    started = time.monotonic()
    console = screen()
    device = cases[0].device
    on_gpu = device == "cuda"
    units = machine.units(device)
    name = f"{machine.device_name(device)}, {machine.counted(units, device)}, torch {torch.__version__}"
    console.print(f"{name}, cuDNN {machine.cudnn()}" if on_gpu else name)
    peaks: dict[str, float] = {}
    if not on_gpu:
        peaks = fma_peaks([case.dtype for case in cases])
        console.print("FMA peak: " + ", ".join(f"{name} {peak:.0f} GF/s" for name, peak in peaks.items()))

    asked = [(case, one) for case in cases for one in case.modes if mode in (None, one)]
    if any(onnx_peer.covers(*each) for each in asked) and (why := onnx_peer.missing()) is not None:
        console.print(escape(why), soft_wrap=True)

    rows: list[Row] = []
    log = Log()
    status = 0
    kernels: set[object] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=case.name)
                if on_gpu and (why := gpu_cases.too_large(case, machine.gpu().total_memory)):
                    log.left_out.append(f"{case.name}: {why}")
                    progress.advance(task)
                    continue
                if limit_s is not None and on_gpu:
                    needed = gpu_cases.predicted_s(case, case.modes, effort.min_pairs, effort.budget_s)
                    needed += 0 if gpu_cases.compiled(case) in kernels else gpu_cases.COMPILE_S
                    if time.monotonic() - started + needed > limit_s:
                        log.left_out.append(f"{case.name}: the {limit_s:.0f} seconds of this run were used up")
                        progress.advance(task)
                        continue
                kernels.add(gpu_cases.compiled(case))
                try:
                    new = case_rows(case, mode, backend, effort, peaks)
                except Mismatch as mismatch:
                    log.wrong.append(str(mismatch))
                    progress.console.print(f"[red]wrong result, no figure:[/] {escape(str(mismatch))}")
                except Exception as error:  # whatever it is, the other cases have figures to give
                    if REFUSED in str(error):
                        log.left_out.append(f"{case.name}: {error}")
                        progress.advance(task)
                        continue
                    log.failed.append(f"{case.name}: {_reason(error)}")
                    progress.console.print(f"[red]failed, no figure:[/] {escape(log.failed[-1])}")
                else:
                    if commit is not None:
                        new = [replace(row, commit=commit) for row in new]
                    rows += new
                    if path is not None:
                        results.write(path, results.merge(results.read(path), new, REGISTRIES[device]))
                    if on_gpu:
                        progress.console.print(escape(_line(new)))
                progress.advance(task)
                if on_gpu and not release():
                    console.print(f"[red]{LOST_AT}{case.name}[/]")
                    status = LOST
                    break
    except KeyboardInterrupt:
        console.print("[yellow]interrupted:[/] what follows is what has been measured so far")
        status = 130

    if rows:
        table.show_rows(console, rows)
        if path is not None:
            console.print(f"rows: {path}")
    log.show(console)
    if on_gpu:
        saved = [] if path is None else results.read(path)
        console.print(table.key_figures(saved or rows), soft_wrap=True)
    return status or (1 if log.wrong or log.failed else 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m bench``."""
    options = parser().parse_args(arguments)
    if options.command == "report":
        if options.out is None:
            report.update()
        elif not report.draw_folder(options.out):
            print(f"there are no results in {options.out}")
            return NOTHING
        return 0
    device = options.device
    if options.threads is not None:
        if device != "cpu":
            print("--threads is for a CPU: a GPU is always used as a whole", file=sys.stderr)
            return 2
        torch.set_num_threads(options.threads)
    registry = REGISTRIES[device]
    if options.after is not None and options.after not in registry:
        print(f"expected the name of a case on {device} for --after, got {options.after!r}", file=sys.stderr)
        return 2
    cases = select(options.group, options.case, options.quick, registry)
    if options.after is not None:
        names = list(registry)
        cases = [case for case in cases if names.index(case.name) > names.index(options.after)]
    if not cases:
        chosen = {
            "--device": device if device != "cpu" else None,
            "--group": options.group,
            "--case": options.case,
            "--quick": options.quick,
            "--after": options.after,
        }
        given = " ".join(f"{name} {value}" for name, value in chosen.items() if value).replace(" True", "")
        print(f"no case matches {given}; see --list", file=sys.stderr)
        return 2
    if options.list:
        (table.show_gpu_cases if device == "cuda" else table.show_cases)(screen(), cases, len(registry))
        return 0
    if device == "cuda" and not torch.cuda.is_available():
        print(f"{NO_GPU}; --list shows the cases, and what each would cost", file=sys.stderr)
        return 2
    path = None
    if not options.no_save and (options.backend == "auto" or device == "cuda"):
        folder = options.out or (QUICK_RESULTS if options.quick else results.RESULTS)
        path = folder / f"{machine.slug(device)}.csv"
    effort = (QUICK if options.quick else FULL)[device]
    return run(cases, options.mode, options.backend, effort, path, options.limit_s, options.commit)
