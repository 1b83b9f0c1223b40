"""``python -m bench gpu``, or ``make gpu``: all that a visit to a machine with a CUDA GPU is for, in one command.

It uses the Python it is started with and downloads nothing.  Each stage runs in processes of its own with a time limit,
so one that hangs is ended and the others still run.  Two tables come last: of the stages, and of what bounds a step of
each shape.  What is left behind is few files, also after an interruption.  ``--dry-run`` runs the part of each stage
that needs no GPU.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import torch

from bench.cases import select
from bench.gpu import model
from bench.gpu.compile import MOST_S
from bench.gpu.packing import listing, pack
from bench.measure import NO_GPU, NOTHING
from bench.rows import RESULTS, Row, read
from bench.session import LOST, LOST_AT
from bench.tables import KEY_FIGURES

ROOT = Path(__file__).parents[2]
RESERVE_S = 10.0  # of the whole: for ending what hangs, and for the table
GRACE_S = 6.0  # for a stage to sum up what it has, once its time is over
START_S = 15.0  # of a stage's time: what importing torch, the first kernels and the tables at the end take
SCREEN = 100  # columns
NO_TESTS = 5  # pytest's exit status when it has collected nothing

Command = list[str]


@dataclass(frozen=True)
class Visit:
    """What the commands of a stage depend on."""

    out: Path  # the folder for files
    commit: str | None = None
    dry: bool = False  # only what needs no GPU
    seconds: float = 0.0  # that the stage has

    @property
    def work_s(self) -> float:
        """Of the stage's time, what is left for its work."""
        return max(self.seconds - START_S, 1.0)

    def rows(self, seconds: float) -> list[str]:
        """Options of what measures for so long."""
        commit = ["--commit", self.commit] if self.commit else []
        return ["--out", str(self.out), "--limit-s", f"{seconds:.0f}", *commit]


@dataclass(frozen=True)
class Stage:
    """One part of a visit."""

    name: str
    what: str
    limit_s: float  # of ten minutes; scaled with --minutes
    commands: Callable[[Visit], list[Command]]
    again: Callable[[int, Sequence[str], Command], Command | None] = lambda status, lines, command: None
    nothing: tuple[int, ...] = (NOTHING,)  # exit statuses that mean: there was nothing to do
    unable: str | None = None  # what a command says that cannot work on this machine
    excused: Callable[[Sequence[str]], bool] = lambda lines: False  # whether a failure is another program's
    environment: Mapping[str, str] = field(default_factory=dict)  # for its commands, of other programs' variables
    least_s: float = 0.0  # of any visit: what its processes take to start and to compile with nothing on disk
    from_minutes: float = 0.0  # a shorter visit leaves it out: its share would not be enough, and the others need it


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    name: str
    status: str  # "ok", "failed", "timed out", "skipped", "left out"
    seconds: float
    figures: str

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "timed out")


def _python(*arguments: str) -> Command:
    """This Python, with output that comes at once."""
    return [sys.executable, "-u", "-m", *arguments]


def _bench(*arguments: str) -> Command:
    return _python("bench", *arguments)


def _bench_again(status: int, lines: Sequence[str], command: Command) -> Command | None:
    """A kernel that breaks CUDA's context ends a process: the cases after it get another one."""
    at = [line.split(LOST_AT)[1].strip() for line in lines if LOST_AT in line]
    if status != LOST or not at:
        return None
    rest = command[: command.index("--after")] if "--after" in command else command
    return [*rest, "--after", at[-1]]


def _sanitizer(visit: Visit) -> list[Command]:
    """The checks that NVIDIA's tool offers; one that says where it is missing."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [[sys.executable, "-c", f"print('compute-sanitizer is not on the PATH'); raise SystemExit({NOTHING})"]]
    if visit.dry:
        return [[tool, "--version"]]
    options = ["--error-exitcode", "9", "--print-limit", "20"]
    return [[tool, "--tool", check, *options, *_bench("smoke", "--unchecked")] for check in ("memcheck", "racecheck")]


def _hazards_of_others(lines: Sequence[str]) -> bool:
    """Whether racecheck found hazards in other kernels alone: on an H200 it reports some in those of cuBLAS."""
    places = [line for line in lines if "ccess at " in line]
    return any("RACECHECK SUMMARY" in line for line in lines) and bool(places) and not any("lstm_" in p for p in places)


def _tests(visit: Visit) -> list[Command]:
    """By name: collecting all the others takes longer than running these."""
    files = ("tests/gpu/test_cuda.py", "tests/module/test_explain.py")
    how = ("--collect-only", "-q") if visit.dry else ("-v", "--tb=short", "--durations=5")
    return [_python("pytest", *files, "-m", "gpu", "-p", "no:cacheprovider", *how)]


def _quick(visit: Visit) -> list[Command]:
    """The quick benchmark, which ends by itself in time, after its kernels have been compiled.

    The kernels by name: "auto" leaves calls to torch on a device that nobody has measured yet.
    """
    quick = ("--device", "cuda", "--quick", "--backend", "triton")
    if visit.dry:
        return [_bench(*quick, "--list")]
    first = visit.work_s / 3
    return [_bench("compile", "--limit-s", f"{first:.0f}"), _bench(*quick, *visit.rows(visit.work_s - first))]


def _smoke(visit: Visit) -> list[Command]:
    """Every case in a process of its own, within what the stage has but for starting these."""
    return [_bench("smoke", *(["--dry-run"] if visit.dry else ["--limit-s", f"{max(visit.seconds - 10, 5):.0f}"]))]


def _streams(visit: Visit) -> list[Command]:
    return [_bench("streams", *(["--dry-run"] if visit.dry else ["--limit-s", f"{visit.work_s:.0f}"]))]


def _experiment(name: str, *options: str) -> Callable[[Visit], list[Command]]:
    """The command of an experiment, for as many cases as there is time for."""
    return lambda visit: [
        _bench(name, "--device", "cuda", *(["--list"] if visit.dry else [*options, *visit.rows(visit.work_s)]))
    ]


def _designs(visit: Visit) -> list[Command]:
    """What compiling leaves of the time, in equal parts for each shape."""
    timing = visit.work_s - min(MOST_S, visit.work_s / 2)
    each = timing / len(select("designs", "cuda"))
    return _experiment("designs", "--seconds", f"{each:.1f}")(visit)


# What matters most comes first; the limits add up to ten minutes less the reserve.
STAGES = (
    Stage(
        "install",
        "the package, from this checkout",
        22,
        lambda visit: [_python("bench.gpu.install", *(["--dry-run"] if visit.dry else []))],
    ),
    Stage("environment", "device, driver and versions", 15, lambda visit: [_bench("environment")]),
    Stage("smoke", "each design once, against torch's LSTM", 55, _smoke, least_s=45.0),
    Stage("tests", "the tests that need a GPU", 82, _tests, nothing=(NO_TESTS,), from_minutes=8),
    Stage("streams", "two streams at once", 38, _streams, least_s=35.0),
    Stage("handoff", "the latency of a hand-off by blocks and bytes", 39, _experiment("handoff")),
    Stage("steps", "microseconds a step, beside torch's and the prediction", 48, _experiment("steps")),
    Stage("designs", "microseconds a step by every design that the tiling may choose", 86, _designs),
    Stage("bench", "the quick benchmark", 163, _quick, again=_bench_again),
    Stage(
        "flow",
        "what recording the gradient flow costs",
        18,
        _experiment("flow", "--seconds", "1"),
        from_minutes=8,
    ),
    Stage("plots", "the figures of its rows", 12, lambda visit: [_bench("report", "--out", str(visit.out))]),
    Stage(
        "sanitizer",
        "memory accesses and races of small cases",
        12,
        _sanitizer,
        unable="Device not supported",
        excused=_hazards_of_others,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # each tensor its own allocation, with its own bounds
        from_minutes=8,
    ),
)


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it started: first politely, so that it can sum up, then for good."""
    for sign, patience in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        if sign == signal.SIGINT:
            continue  # what it started may still be there
    process.wait()


def _group() -> dict[str, object]:
    """The argument that puts a child into a process group of its own: the newer one keeps it in our session."""
    return {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


def run_command(
    command: Command, timeout_s: float, say: Callable[[str], None], environment: Mapping[str, str]
) -> tuple[int | None, list[str]]:
    """Runs a command from the repository's root; its exit status, None if its time was over, and its lines."""
    say(f"$ {' '.join(command)}")
    lines: list[str] = []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        **_group(),  # type: ignore[call-overload]
    )
    stream = process.stdout
    assert stream is not None

    def read() -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))
            say(lines[-1])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    status: int | None = None
    try:
        status = process.wait(max(timeout_s, 0.0))
    except subprocess.TimeoutExpired:
        say(f"ended: the {timeout_s:.0f} seconds for it are over")
    finally:
        if status is None:
            _end(process)
    reader.join(GRACE_S)  # until the pipe is read to its end
    return status, lines


def _figures(lines: Iterable[str]) -> str:
    """What a command has found in short: the line that says so, else its last one."""
    told = [line.strip() for line in lines if line.strip()]
    marked = [line.removeprefix(KEY_FIGURES) for line in told if line.startswith(KEY_FIGURES)]
    return (marked or [line.strip("= ") for line in told[-1:]] or [""])[-1]


def run_stage(stage: Stage, commands: Sequence[Command], timeout_s: float, say: Callable[[str], None]) -> Outcome:
    """Runs a stage's commands one after the other within its time."""
    started = time.monotonic()
    say(f"\n=== {stage.name}: {stage.what} ({timeout_s:.0f} s at most)")
    states: list[str] = []
    told: list[str] = []
    waiting = list(commands)
    while waiting:
        command = waiting.pop(0)
        status, lines = run_command(command, timeout_s - (time.monotonic() - started), say, stage.environment)
        if status is None:
            states.append("timed out")
        elif status == 0:
            states.append("ok")
        else:
            unable = stage.unable is not None and any(stage.unable in line for line in lines)
            excused = "ok" if stage.excused(lines) else "failed"
            states.append("skipped" if unable or status in stage.nothing else excused)
        told.append(_figures(lines))
        if status is not None and (more := stage.again(status, lines, command)) is not None:
            waiting.insert(0, more)
        if time.monotonic() - started >= timeout_s:
            if waiting:
                states.append("timed out")
            break
    worst = next(state for state in ("timed out", "failed", "ok", "skipped") if state in states)
    return Outcome(stage.name, worst, time.monotonic() - started, "; ".join(dict.fromkeys(filter(None, told))))


def shares(stages: Sequence[Stage], minutes: float) -> dict[str, float]:
    """The seconds that each stage is sure to get: its part of the visit, or its least where there is room for that."""
    whole = max(minutes * 60 - RESERVE_S, 1.0)
    room = sum(stage.least_s for stage in stages) < whole
    least: set[str] = set()
    while True:
        others = [stage for stage in stages if stage.name not in least]
        left = whole - sum(stage.least_s for stage in stages if stage.name in least)
        scale = left / sum(stage.limit_s for stage in others) if others else 0.0
        short = {stage.name for stage in others if room and stage.limit_s * scale < stage.least_s}
        if not short:
            return {each.name: each.least_s if each.name in least else each.limit_s * scale for each in stages}
        least |= short


def run_stages(stages: Sequence[Stage], minutes: float, visit: Visit, say: Callable[[str], None]) -> Iterator[Outcome]:
    """Runs the stages in order: each has its share of the time, and what those before it left over."""
    ends = time.monotonic() + minutes * 60 - RESERVE_S
    sure = shares(stages, minutes)
    for index, stage in enumerate(stages):
        later = sum(sure[each.name] for each in stages[index + 1 :])
        seconds = max(ends - time.monotonic() - later - GRACE_S, 1.0)
        yield run_stage(stage, stage.commands(replace(visit, seconds=seconds)), seconds, say)


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """What became of the stages, narrow enough for any screen."""
    lines = [f"{'stage':<12} {'status':<10} {'seconds':>7}  key figures"]
    for each in outcomes:
        first = f"{each.name:<12} {each.status:<10} {each.seconds:7.0f}  "
        wrapped = textwrap.wrap(each.figures, SCREEN, initial_indent=first, subsequent_indent=" " * len(first))
        lines += wrapped or [first.rstrip()]
    return lines


def _terminated(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def measured(out: Path, dry_run: bool) -> list[Row]:
    """The rows of the visit; in a dry run those of earlier ones, to have something to show."""
    return [row for path in sorted((RESULTS if dry_run else out).glob("*sm.csv")) for row in read(path)]


def last_tables(outcomes: Sequence[Outcome], out: Path, dry_run: bool) -> list[str]:
    """The stages, then what bounds a step of each shape."""
    title = ["what bounds a step: shares of its measured time, by the model; tensor: of the tensor cores' peak"]
    if dry_run:
        title += ["from the rows in bench/results: nothing is measured now"]
    try:
        bounds = list(model.bound_lines(model.bounds(measured(out, dry_run))))
    except (KeyError, ValueError) as error:  # rows of another version's columns must not cost the table of stages
        bounds = [f"no table: {error}"]
    order = [stage.name for stage in STAGES]
    stages = sorted(outcomes, key=lambda each: order.index(each.name))
    return [*summary(stages), "", *title, *bounds]


def left_out(stages: Sequence[Stage], minutes: float) -> list[Outcome]:
    """What a visit of so many minutes is too short for."""
    said = "for visits from {0:g} minutes on; --stage {1} runs it by itself"
    short = [each for each in stages if minutes < each.from_minutes]
    return [Outcome(each.name, "left out", 0.0, said.format(each.from_minutes, each.name)) for each in short]


def _visit(chosen: Sequence[Stage], minutes: float, visit: Visit, outcomes: list[Outcome]) -> int:
    """Runs the stages, adds to ``outcomes``, and says everything on the screen and in a log; 130 if interrupted."""
    status = 0
    before = signal.signal(signal.SIGTERM, _terminated)  # so that no stage outlives this process
    with (visit.out / "gpu.log").open("w", encoding="utf-8") as log:

        def say(line: str) -> None:
            for file in (sys.stdout, log):
                print(line, file=file, flush=True)

        if visit.dry:
            say("dry run: nothing is measured, and no GPU figure comes of it")
            for name, seconds in shares(chosen, minutes).items():
                say(f"{name:<12} gets {seconds:4.0f} s of {minutes:g} minutes, and what is left over before it")
        try:
            for outcome in run_stages(chosen, minutes, visit, say):
                outcomes.append(outcome)
        except KeyboardInterrupt:
            say("interrupted")
            status = 130
        finally:
            signal.signal(signal.SIGTERM, before)
            lines = last_tables(outcomes, visit.out, visit.dry)
            (visit.out / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            for line in ("", *lines):
                say(line)
    return status


def run(stage: Sequence[str] | None, minutes: float, out: Path, commit: str | None, dry_run: bool) -> int:
    """``python -m bench gpu``: all stages, or those of these names.

    0 if all went well, 1 if one failed, 2 without a GPU or for an unknown name, 130 if it was interrupted.
    """
    if unknown := set(stage or ()) - {each.name for each in STAGES}:
        print(f"unknown stage {', '.join(sorted(unknown))}: expected {', '.join(each.name for each in STAGES)}")
        return 2
    outcomes = [] if stage else left_out(STAGES, minutes)
    short = {each.name for each in outcomes}
    chosen = [each for each in STAGES if each.name not in short and (stage is None or each.name in stage)]
    if not dry_run and not torch.cuda.is_available():
        print(f"{NO_GPU}, and no GPU figure exists from this machine; --dry-run shows what would run")
        return 2
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    before = listing(out)
    try:
        status = _visit(chosen, minutes, Visit(out, commit, dry_run), outcomes)
    finally:
        packed = pack(out, before)
    for line in (*packed, f"files: {out}"):
        print(line)
    return status or (1 if any(outcome.bad for outcome in outcomes) else 0)
