"""The time of a step by every design that the tiling may choose from.

For a few shapes, each way to share the work runs once for its result (compared with torch's LSTM in float32) and then
for its time: that of the recurrence alone, between two events around its launch, over the steps.  Beside it stands
what the model (``kernels/gpu/tiling.py``) predicted: the constants there are fitted to this table, and fitted again at
its end.  The tiling's choice comes first, then the others by their predicted times, as far as the time for a case goes.

Legend: T steps, B batch, H hidden; U units of a program.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from lstmcore.kernels.gpu import tiling
from lstmcore.kernels.gpu.tiling import Design
from rich.console import Console
from torch import Tensor, nn

import lstmcore
from bench.cases import Case, select
from bench.gpu import launches, model
from bench.gpu.compile import MOST_S, spread
from bench.gpu.model import SHARES
from bench.measure import Experiment, Task, row_of
from bench.rows import RESULTS, Row, read
from bench.timing import Effort
from bench.verify import Mismatch

DEVICE = "cuda"
BOUND = 8 * torch.finfo(torch.bfloat16).eps  # of a result, relative to its norm
TOLD = ("rows", "groups", "tiles", "slices")  # what a kernel is told when it runs, and not compiled for
H200 = (132, 227 * 1024, True)  # multiprocessors, bytes of shared memory, whether they have wgmma


def designs(hidden: int, batch: int, backward: bool, sms: int, shared: int, wgmma: bool) -> list[Design]:
    """The tiling's choice, and all others by their predicted times."""
    chosen = tiling.choose_design(hidden, batch, 1, "16", sms, backward, shared=shared, wgmma=wgmma)
    others = tiling.every_design(hidden, batch, 1, "16", sms, backward, shared, wgmma)
    return [chosen, *sorted((each for each in others if each != chosen), key=lambda each: each.step_time)]


class Problem:
    """A shape's data, and both passes of a layer."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        hidden, like = case.hidden_size, {"device": DEVICE, "dtype": case.torch_dtype}
        self.module = lstmcore.LSTM(hidden, hidden, backend="triton", **like)
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)  # of the gradients only the input's is wanted: the rest is no recurrence
        self.input = torch.randn(case.steps, case.batch, hidden, **like, requires_grad=True)
        self.grad = torch.randn_like(self.input)

    def forward(self) -> Tensor:
        """The output, in training."""
        return self.module(self.input)[0]

    def backward(self, output: Tensor) -> Tensor:
        """The gradient of the input; the graph stays for another pass."""
        return torch.autograd.grad(output, self.input, self.grad, retain_graph=True)[0]

    def expected(self) -> tuple[Tensor, Tensor]:
        """Both, of torch's LSTM in float32."""
        wide = nn.LSTM(*[self.input.shape[-1]] * 2, device=DEVICE)
        wide.load_state_dict(self.module.state_dict())
        x = self.input.detach().float().requires_grad_()
        output = wide(x)[0]
        return output.detach(), torch.autograd.grad(output, x, self.grad.float())[0]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().float() - expected).norm() / expected.norm())


def timed(design: Design, run: Callable[[], Tensor], expected: Tensor, samples: int) -> tuple[float, float]:
    """Median microseconds of a launch of the recurrence, and how far its result is off; Mismatch where it is wrong."""
    with launches.using(design):
        off = error(launches.timed(run)[1], expected)
        if not off < BOUND:
            raise Mismatch(f"wrong result: {off:.1e} off, more than {BOUND:.1e}")
        return statistics.median(launches.timed(run)[0] for _ in range(samples)), off


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row a design, forward (in training) and backward, until each has used up half of the task's time.

    Raises RuntimeError at the end if a design could not run or computed something else; the others have their rows.
    """
    problem, failures, samples = Problem(case), [], task.effort.min_pairs
    expected, expected_grad = problem.expected()
    output = problem.forward()
    for backward in (False, True):
        choice = designs(case.hidden_size, case.batch, backward, *launches.limits())
        run = (lambda: problem.backward(output)) if backward else problem.forward
        ends = time.monotonic() + task.effort.budget_s / 2
        for design in choice:
            if design != choice[0] and time.monotonic() > ends:
                break
            try:
                us, off = timed(design, run, expected_grad if backward else expected, samples)
            except Exception as failure:  # whatever it is, the other designs have figures to give
                failures.append(f"{'backward' if backward else 'forward'}, {design}: {failure}")
                continue
            shares = model.shares_of(design)
            said = {"chosen": str(design == choice[0]), "predicted_us": f"{design.step_time:.6g}"}
            yield row_of(
                "designs",
                case,
                "backward" if backward else "forward",
                variant=model.name_of(shares),
                backend="triton",
                pairs=samples,
                p50_ms=us / case.steps / 1e3,
                max_error=off,
                reference="torch float32",
                details={**shares, **said, "feasible": str(len(choice))},
            )
    if failures:
        raise RuntimeError("; ".join(failures))


def kernels(sms: int, shared: int, wgmma: bool) -> list[tuple[Case, bool, Design]]:
    """One design for each kernel that will be wanted: its case, backward, itself."""
    wanted = {}
    for case in select("designs", "cuda"):
        for backward in (False, True):
            for each in designs(case.hidden_size, case.batch, backward, sms, shared, wgmma):
                shares = (value for name, value in model.shares_of(each).items() if name not in TOLD)
                wanted.setdefault((case.hidden_size, backward, *shares), (case, backward, each))
    return list(wanted.values())


def compile_share(worker: int, workers: int) -> None:
    """Every ``workers``-th kernel, for the cache on disk."""
    for case, backward, design in kernels(*launches.limits())[worker::workers]:
        problem = Problem(replace(case, steps=2))
        output = problem.forward() if backward else None
        with launches.using(design):
            problem.forward() if output is None else problem.backward(output)


def plan(case: Case) -> Iterator[str]:
    """Says what would run on an H100 or H200; after the last case the fit to the committed rows."""
    for backward in (False, True):
        for each in designs(case.hidden_size, case.batch, backward, *H200):
            yield f"H {case.hidden_size}, B {case.batch}, {'backward' if backward else 'forward'}: {each}"
    if case == select("designs", "cuda")[-1]:
        committed = (row for path in sorted(RESULTS.glob("*sm.csv")) for row in read(path))
        yield "the constants of the model, fitted to the rows in bench/results (nothing of this is measured now):"
        yield from model.fitted_lines([model.step_of(row) for row in committed if row.experiment == "designs"])


def show(console: Console, rows: Sequence[Row]) -> None:
    """How many of the designs were timed, and the constants that fit them."""
    by_pass: dict[str, list[Row]] = {}
    for row in rows:
        by_pass.setdefault(f"H{row.hidden_size} B{row.batch} {row.mode}", []).append(row)
    timed = (f"{name} {len(same)} of {same[0].details['feasible']}" for name, same in by_pass.items())
    for line in (f"designs timed: {', '.join(timed)}", *model.fitted_lines([model.step_of(row) for row in rows])):
        console.print(line, soft_wrap=True, highlight=False)


def key_figures(rows: Sequence[Row]) -> str:
    """How many designs were timed, and by how much the tiling's choice misses the best of a shape and pass."""
    by_pass: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_pass.setdefault((row.case, row.mode), []).append(row)
    over = []
    for same in by_pass.values():
        chosen = [row.p50_ms for row in same if row.details["chosen"] == "True"]
        over += [chosen[0] / min(row.p50_ms for row in same)] if chosen else []
    if not over:
        return "none"
    chosen = f"the chosen one took {max(over):.2f} of the best's time at most"
    return f"{len(rows)} designs of {len(over)} shapes and passes; {chosen}"


DESIGNS = Experiment(
    name="designs",
    what="the time of a step on a GPU by every design that the tiling may choose from, its choice first",
    times="a step of the recurrence",
    measure=measure,
    full={"cuda": Effort(5, 30.0)},
    details={
        **dict.fromkeys(SHARES, "of the design: see kernels/gpu/tiling.py"),
        "chosen": "whether the tiling takes this one",
        "predicted_us": "microseconds of a step, as the tiling's model has it",
        "feasible": "how many designs of this shape and pass the tiling may choose from",
    },
    prepare=lambda limit_s: spread(compile_share, min(MOST_S, limit_s / 2)),
    plan=plan,
    show=show,
    key_figures=key_figures,
    whole=True,
)
