"""Two commits of this repository side by side: what no test notices is a slower call, or one that takes more memory.

Each commit is built from a worktree of its own under build/compare and runs in processes of its own, on the cases and
with the timer of this checkout.  A round has three fresh processes, two of the first commit (A) and one of the second
(B), which take turns; the order is drawn.  How much two processes of the same commit differ is the noise: B counts as
slower or larger where it is further from A than any two processes of A are from each other, and by more than ``LEAST``.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

import lstmcore
from bench import tables, timing
from bench.cases import CASES, Case, select
from bench.measure import checked
from bench.memory import peak_memory_mib
from bench.providers import OURS, Runner, build, draw
from bench.session import screen

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Callable[[], None] | None] = {"after torch": timing.operation, "alone": None}
LEAST = {"ms": 0.03, "MiB": 0.05}  # what is not worth a word, however steady: shares of A's figure


@dataclass
class Figures:
    """What one call took in each process."""

    unit: str  # "ms" or "MiB"
    a: list[float] = field(default_factory=list)  # two processes a round
    b: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return median(self.b) / median(self.a)

    @property
    def noise(self) -> float:
        """By what share the processes of A differ at most."""
        return max(self.a) / min(self.a) - 1

    @property
    def verdict(self) -> str:
        """ "worse", "better", or nothing within the noise."""
        beyond = 1 + max(self.noise, LEAST[self.unit])
        return "worse" if self.ratio > beyond else "better" if self.ratio < 1 / beyond else ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def installed(name: str) -> tuple[str, Path]:
    """The short hash of a commit, and where it is installed alone; ``.`` stands for the tracked files as they are."""
    commit = (_git("stash", "create") or "HEAD") if name == "." else name
    short = _git("rev-parse", "--short", "--verify", f"{commit}^{{commit}}")
    tree, site = (ROOT / "build" / "compare" / short / part for part in ("tree", "site"))
    if not (ready := site.parent / "ready").exists():
        _git("worktree", "prune")
        _git("worktree", "add", "--force", "--detach", str(tree), commit)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target"]
        subprocess.run([*command, str(site), str(tree)], check=True)
        ready.touch()
    return short, site


def _place(site: Path) -> dict[str, object]:
    """Where a process runs, to import the package from there and the benchmark from here."""
    return {"cwd": site, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}


class Process:
    """One that computes for a commit: answers each line of JSON with a number."""

    def __init__(self, site: Path) -> None:
        command = [sys.executable, "-m", "bench.compare", str(site), str(torch.get_num_threads())]
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **_place(site),  # type: ignore[call-overload]
        )

    def ask(self, **question: object) -> float:
        self.child.stdin.write(json.dumps(question) + "\n")
        self.child.stdin.flush()
        if not (answer := self.child.stdout.readline()):
            raise RuntimeError(f"the process for {self.child.args[-2]} ended with status {self.child.wait()}")
        return float(answer)


@contextmanager
def started(site: Path) -> Iterator[Process]:
    process = Process(site)
    try:
        yield process
    finally:
        process.child.stdin.close()
        process.child.wait()


def answer(site: Path) -> None:
    """The other end: runs until there is no further line."""
    if site not in Path(lstmcore.__file__).parents:
        raise ImportError(f"expected lstmcore from {site}, got {lstmcore.__file__}")
    at: tuple[str, Runner] | None = None
    for line in sys.stdin:
        question = json.loads(line)
        case = CASES[question["case"]]
        if question["calls"] == 0:
            checked(case, case.modes)  # raises Mismatch for a wrong result: no figure
            result = 0.0
        else:
            if at is None or at[0] != case.name:
                at = case.name, build(OURS, draw(case))
            call, before = getattr(at[1], question["mode"]), SETTINGS[question["setting"]]
            clock = timing.CLOCKS[case.device]
            if question["calls"] is None:
                call()  # compilers and caches are warm after it
                result = timing.probe(call, clock)
            else:
                result = timing.sample(call, question["calls"], clock, before)
        print(result, flush=True)


def times(
    cases: Sequence[Case], sites: Sequence[Path], samples: int
) -> Iterator[tuple[tuple[str, str, str], list[float]]]:
    """Each case, mode and setting with the median of each process, in milliseconds; one process a site, by turns."""
    order = random.Random(0)
    with ExitStack() as stack:
        processes = [stack.enter_context(started(site)) for site in sites]
        for case in cases:
            for mode in case.modes:
                where = {"case": case.name, "mode": mode}
                slowest = max(process.ask(**where, setting="alone", calls=None) for process in processes)
                calls = max(1, math.ceil(timing.SAMPLE_S / slowest))
                for setting in SETTINGS:
                    taken: list[list[float]] = [[] for _ in processes]
                    for _ in range(samples):
                        for index in order.sample(range(len(processes)), len(processes)):
                            taken[index].append(processes[index].ask(**where, setting=setting, calls=calls))
                    yield (case.name, mode, setting), [median(each) * 1e3 for each in taken]


def compare(
    cases: Sequence[Case], a: Path, b: Path, rounds: int, samples: int, memory: bool
) -> dict[tuple[str, str, str], Figures]:
    """The figures by case, mode and setting (of memory: "peak memory")."""
    console = screen()
    for site in dict.fromkeys((a, b)):
        with started(site) as process:
            for case in cases:
                process.ask(case=case.name, calls=0)
    figures: dict[tuple[str, str, str], Figures] = {}
    for number in range(rounds):
        console.print(f"round {number + 1} of {rounds}")
        for key, found in times(cases, (a, a, b), samples):
            both = figures.setdefault(key, Figures("ms"))
            both.a += found[:2]
            both.b += found[2:]
        for case in cases if memory else ():
            if "memory" in case.tags and "training" in case.modes:
                both = figures.setdefault((case.name, "training", "peak memory"), Figures("MiB"))
                first, second, other = (peak_memory_mib(case, OURS, **_place(site)) for site in (a, a, b))
                both.a += (first, second)
                both.b.append(other)
    return figures


def show(figures: dict[tuple[str, str, str], Figures], names: tuple[str, str]) -> None:
    """The table."""
    table = tables.grid(
        f"{names[0]} (A) and {names[1]} (B)",
        ("case", "mode", "setting", ""),
        ("A", "B", "B / A", "noise"),
        "medians over the processes; noise: how far two processes of A are apart at most",
    )
    table.add_column("B is")
    for key, both in sorted(figures.items()):
        verdict = {"worse": "[red]worse[/]", "better": "[green]better[/]", "": ""}[both.verdict]
        middle = (f"{median(side):.4g}" for side in (both.a, both.b))
        table.add_row(*key, both.unit, *middle, f"{both.ratio:.3f}", f"{both.noise:.1%}", verdict)
    screen().print(table)


def run(a: str, b: str, pattern: str | None, rounds: int, samples: int, memory: bool) -> int:
    """``python -m bench compare A B``: 0, 1 where B is worse in anything, 2 where there is nothing to compare."""
    cases = select(pattern=pattern) if pattern else [case for case in CASES.values() if "compare" in case.tags]
    if not cases:
        print(f"no case matches --case {pattern}; see --list", file=sys.stderr)
        return 2
    try:
        (first, site_a), (second, site_b) = installed(a), installed(b)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    figures = compare(cases, site_a, site_b, rounds, samples, memory)
    show(figures, (first, second))
    worse = sum(both.verdict == "worse" for both in figures.values())
    print(f"{worse} of {len(figures)} figures of {second} are worse than those of {first}, beyond the noise")
    return 1 if worse else 0


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    answer(Path(sys.argv[1]))
