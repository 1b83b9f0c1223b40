"""Two commits of this repository side by side: what no test notices is a slower call, or one that takes more memory.

Each commit is built from a worktree of its own under build/compare and runs in processes of its own, on the cases and
with the timer of this checkout.  A round has three fresh processes, two of the first commit (A) and one of the second
(B), which take turns; the order is drawn.  A process's figure is the lower quartile of its samples, for whatever else
the machine does only adds to a time.  How much processes of the same commit differ is the noise: B counts as worse
where it is further from A than any two processes of A are from each other, and by more than ``LEAST``.
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
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

import lstmcore
from bench import timing
from bench.cases import CASES, Case, select
from bench.measure import checked
from bench.memory import peak_memory_mib
from bench.providers import OURS, Runner, build, draw
from bench.session import screen
from bench.tables import grid

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Callable[[], None] | None] = {"after torch": timing.operation, "alone": None}
LEAST = {"ms": 0.03, "MiB": 0.05}  # shares of A's figure: what is not worth a word, however steady

Key = tuple[str, str, str]  # case, mode, and setting or what else was measured


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
        """Of B: "worse", "better", or nothing within the noise."""
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


def _place(site: Path) -> dict[str, Any]:
    """Where a process runs, to import the package from there and the benchmark from here."""
    return {"cwd": site, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}


@contextmanager
def started(site: Path) -> Iterator[Callable[..., float]]:
    """A process that computes for a commit: a function of a question, as :func:`answer` takes it."""
    command = [sys.executable, "-m", "bench.compare", str(site), str(torch.get_num_threads())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen(command, **pipes, **_place(site)) as child:
        assert child.stdin is not None and child.stdout is not None
        questions, answers = child.stdin, child.stdout

        def ask(**question: object) -> float:
            print(json.dumps(question), file=questions)
            if not (line := answers.readline()):
                raise RuntimeError(f"the process of {site} ended with status {child.wait()}")
            return float(line)

        yield ask


@lru_cache(maxsize=1)
def _runner(case: str) -> Runner:
    return build(OURS, draw(CASES[case]))


def answer(case: str, mode: str = "", setting: str = "alone", calls: int | None = None) -> float:
    """Without a mode: 0, after a check; without a number of calls: about how long one takes; else a sample, a call."""
    if not mode:
        checked(CASES[case], CASES[case].modes)  # raises Mismatch for a wrong result: no figure
        return 0.0
    call, clock = getattr(_runner(case), mode), timing.CLOCKS["cpu"]
    if calls is None:
        call()  # after which compilers and caches are warm
        return timing.probe(call, clock)
    return timing.sample(call, calls, clock, SETTINGS[setting])


def times(cases: Sequence[Case], sites: Sequence[Path], samples: int) -> Iterator[tuple[Key, list[float]]]:
    """Each case, mode and setting with the milliseconds of each process, one a site; they take turns."""
    turns = random.Random(0)
    with ExitStack() as stack:
        asks = [stack.enter_context(started(site)) for site in sites]
        for name, mode in [(case.name, mode) for case in cases for mode in case.modes]:
            slowest = max(ask(case=name, mode=mode) for ask in asks)
            calls = max(1, math.ceil(timing.SAMPLE_S / slowest))
            for setting in SETTINGS:
                taken: list[list[float]] = [[] for _ in asks]
                for _ in range(samples):
                    for index in turns.sample(range(len(asks)), len(asks)):
                        taken[index].append(asks[index](case=name, mode=mode, setting=setting, calls=calls) * 1e3)
                yield (name, mode, setting), [timing.percentile(tuple(each), 0.25) for each in taken]


def compare(cases: Sequence[Case], a: Path, b: Path, rounds: int, samples: int, memory: bool) -> dict[Key, Figures]:
    """The figures of all that is measured of the two, in so many rounds."""
    for site in dict.fromkeys((a, b)):
        with started(site) as ask:
            for case in cases:
                ask(case=case.name)
    figures: dict[Key, Figures] = {}
    heavy = [case for case in cases if memory and "memory" in case.tags and "training" in case.modes]
    for _ in range(rounds):
        found = [(key, "ms", each) for key, each in times(cases, (a, a, b), samples)]
        for case in heavy:
            each = [peak_memory_mib(case, OURS, **_place(site)) for site in (a, a, b)]
            found.append(((case.name, "training", "peak memory"), "MiB", each))
        for key, unit, (first, second, other) in found:
            both = figures.setdefault(key, Figures(unit))
            both.a += [first, second]
            both.b += [other]
    return figures


def run(a: str, b: str, case: str | None, rounds: int, samples: int, threads: int | None, no_memory: bool) -> int:
    """``python -m bench compare A B``: 0, 1 where B is worse in anything, 2 where there is nothing to compare."""
    torch.set_num_threads(threads or torch.get_num_threads())
    cases = select(pattern=case) if case else [each for each in CASES.values() if "compare" in each.tags]
    if not cases:
        print(f"no case matches --case {case}; see --list", file=sys.stderr)
        return 2
    try:
        (first, site_a), (second, site_b) = map(installed, (a, b))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    figures = compare(cases, site_a, site_b, rounds, samples, not no_memory)
    table = grid(
        f"{first} (A) and {second} (B), {torch.get_num_threads()} threads",
        ("case", "mode", "", "unit"),
        ("A", "B", "B / A", "noise", "B is"),
        "noise: by how much two processes of A differ at most",
    )
    colours = {"worse": "[red]worse[/]", "better": "[green]better[/]", "": ""}
    for key, both in figures.items():
        middle = (f"{median(side):.4g}" for side in (both.a, both.b))
        table.add_row(*key, both.unit, *middle, f"{both.ratio:.3f}", f"{both.noise:.1%}", colours[both.verdict])
    screen().print(table)
    worse = sum(both.verdict == "worse" for both in figures.values())
    print(f"{worse} of {len(figures)} figures of {second} are worse than those of {first}, beyond the noise")
    return 1 if worse else 0


if __name__ == "__main__":
    site, threads = sys.argv[1:]
    if Path(site) not in Path(lstmcore.__file__).parents:
        raise ImportError(f"expected lstmcore from {site}, got {lstmcore.__file__}")
    torch.set_num_threads(int(threads))
    for line in sys.stdin:
        print(answer(**json.loads(line)), flush=True)
