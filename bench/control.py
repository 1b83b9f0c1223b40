"""What sequence control costs: ``lengths``, ``reset`` and ``return_cells`` of a call, and what they save.

    python -m bench.control            # seven minutes on two cores; updates out/bench/control/<device>.csv
    python -m bench.control --save     # updates bench/results/control/<device>.csv
    python -m bench.control --quick    # some of the shapes, a few repetitions
    python -m bench.control --slow     # also torch's packed training where a single call takes seconds

* reset: a call with a mask of resets against the same call without; a mask without any True has to be free as well.
* lengths: all equal to T, against no lengths; ragged, against a dense call of as many tokens in as many rows, by the
  time a token; and against packing: ``pack_padded_sequence``, the LSTM, ``pad_packed_sequence``.
* cells: a call that returns every c_t, against one that does not.
* rollout: a training step over a rollout of reinforcement learning, a row an environment, with a reset wherever an
  episode begins; against what is written with ``torch.nn`` instead: a loop over the segments between resets, a loop
  over the steps, or all sequences packed as one batch.

Before a pair is timed, the outputs and all gradients of both are checked against float64, on the very data.  Two that
are compared alternate in one process; a ratio is the median over the pairs of their own ratios.

Legend: T steps, B batch, I input, H hidden, S sequences that resets make of the rows, L steps of the longest of them.
"""

from __future__ import annotations

import argparse
import csv
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench import machine, results
from bench.cases import Case, select
from bench.providers import OURS, OUTPUTS, PEER, Problem, Runner, build, draw
from bench.run import screen
from bench.timing import interleave, percentile
from bench.verify import FACTOR, FLOAT64_BOUND, FLOOR_EPS, SAME_DTYPE_BOUND, Mismatch, relative_error

BACKEND = "numba"  # by name, also of the dense calls: "auto" may leave those to torch
COST_LIMIT = 1.03  # of resets and of lengths, what the project promises: time over that of the dense call
SPEED_LIMIT = 3.0  # of the rollout over the segment loop: its time over ours
SHARES = (0.0, 0.03, 0.30)  # of the steps that begin with a reset
ROLLOUT_SHARE = 0.03
PROMISED_BATCH = 128  # smaller rollouts have longer segments; they are measured, but nothing is promised of them
OUT = Path("out/bench")


class Effort(NamedTuple):
    """How often a pair is measured: at least so many times, and on for so long; and whether to wait for SLOW peers."""

    min_pairs: int
    budget_s: float
    slow: bool = False


FULL, QUICK = Effort(7, 0.6), Effort(3, 0.1)


def _cases() -> Iterator[Case]:
    quick = ((64, 32), (16, 8))
    for experiment, shapes in (
        ("reset", ((128, 32, 1000), (256, 32, 500), (64, 32, 1000), (512, 8, 500), (16, 8, 1000))),
        ("lengths", ((128, 32, 250), (256, 32, 500), (64, 32, 1000), (16, 8, 1000))),
        ("cells", ((128, 32, 1000), (256, 32, 500), (16, 8, 1000))),
    ):
        for hidden, batch, steps in shapes:
            name = f"{experiment}-h{hidden}-b{batch}-t{steps}"
            yield Case(name, experiment, hidden, hidden, batch, steps, quick=(hidden, batch) in quick)
    for features, batch in ((64, 128), (256, 128), (64, 32), (64, 8)):
        name = f"rollout-h256-i{features}-b{batch}-t128"
        yield Case(name, "rollout", features, 256, batch, 128, modes=("training",), quick=batch == 8)


CASES = {case.name: case for case in _cases()}
# In torch's packed training every step's slice has a gradient as large as the gates of all steps, so that the time
# grows with the square of T.  Of these shapes one call takes between two and thirty seconds.
SLOW = {
    "lengths-h256-b32-t500", "lengths-h64-b32-t1000",
    "rollout-h256-i64-b128-t128", "rollout-h256-i256-b128-t128", "rollout-h256-i64-b32-t128",
}  # fmt: skip
if unknown := SLOW - CASES.keys():
    raise ValueError(f"expected names of cases, got {sorted(unknown)}")


@dataclass(frozen=True)
class ControlRow:
    """One call of ours beside another call that does the same, or the same without control."""

    commit: str
    date: str
    torch: str
    numba: str
    device: str
    threads: int
    experiment: str
    case: str
    mode: str
    variant: str  # what the call of ours was told
    peer: str
    tokens: int  # steps that are computed, over all rows
    peer_tokens: int
    pairs: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peer_p20_ms: float
    peer_p50_ms: float
    peer_p80_ms: float
    kind: str  # "cost": a token of ours over one of the peer's; "speed": the peer's time over ours
    ratio: float  # median over the pairs
    ratio_p20: float
    ratio_p80: float
    limit: float | None  # of a cost from above, of a speed from below; None where nothing is promised

    @property
    def key(self) -> tuple[str, ...]:
        """What makes a row of a file unique: a later row of the same key replaces it."""
        return self.case, self.mode, self.variant, self.peer

    @property
    def broken(self) -> bool:
        """Whether the ratio breaks what is promised."""
        return self.limit is not None and (self.ratio > self.limit if self.kind == "cost" else self.ratio < self.limit)


@dataclass(frozen=True)
class Control:
    """What a call is told about its sequences, and whether the loss reads the cells it returns."""

    lengths: Tensor | None = None  # (B,), none of them zero
    reset: Tensor | None = None  # (T, B), bool
    cells: bool = False
    cell_loss: bool = False


NONE = Control()


def _generator(*key: object) -> torch.Generator:
    """Everybody draws the same for the same key."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def draw_reset(case: Case, share: float) -> Tensor:
    """(T, B), bool: a step of a row begins with a reset as often as ``share`` says, the first step too."""
    return torch.rand(case.steps, case.batch, generator=_generator(case.name, share)) < share


def ragged_lengths(case: Case) -> dict[str, Tensor]:
    """Lengths (B,) by what they are called."""
    half = [case.steps if row % 2 == 0 else case.steps // 2 for row in range(case.batch)]
    uniform = Case("", "", 1, 1, case.batch, case.steps, mean_length=0.5).lengths()
    return {"uniform": torch.tensor(uniform), "T and T/2": torch.tensor(half)}


class Side(Runner):
    """Who computes a problem, how, and under which control; outputs are (T, B, ·), zero beyond the lengths."""

    how = ""  # the last part of the name

    def __init__(self, problem: Problem, control: Control = NONE, provider: str = PEER) -> None:
        super().__init__(build(provider, problem, BACKEND).module, problem)
        self.control = control
        self.name = f"{provider} {self.how}"
        self.grads: tuple[Tensor, ...] = problem.grad_outputs
        if control.cell_loss:
            case, like = problem.case, problem.grad_outputs[0]
            shape = (len(problem.input), case.batch, case.hidden_size)
            self.grads += (torch.randn(shape, generator=_generator(case.name, "cells")).to(like.dtype),)
        reset = control.reset
        # As a rollout's buffer holds it, which is not part of what is timed: 0 where a sequence begins.
        self.keep = None if reset is None else (~reset).to(problem.input.dtype)  # (T, B)

    @property
    def tokens(self) -> int:
        """The steps that are computed, over all rows."""
        lengths = self.control.lengths
        return self.input.shape[0] * self.input.shape[1] if lengths is None else int(lengths.sum())

    def training(self) -> tuple[Tensor, ...]:
        """As of any Runner; where there are cells, the loss need not read them."""
        self.module.train()
        outputs = self.forward()
        return *outputs, *torch.autograd.grad(outputs[: len(self.grads)], self.leaves, self.grads)


class Direct(Side):
    """One call: of ours with all the control there is, of torch without any."""

    how = "dense"

    def __init__(self, problem: Problem, control: Control = NONE, provider: str = PEER) -> None:
        super().__init__(problem, control, provider)
        if control is not NONE:
            self.name = f"{provider} with control"

    def forward(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        control = self.control
        if control is NONE:
            output, states = self.module(self.input, self.hx)
            return output, *states
        output, states, *cells = self.module(
            self.input, self.hx, lengths=control.lengths, reset=control.reset, return_cells=control.cells
        )
        return output, *states, *cells


class Packed(Side):
    """Lengths by packing: padded in, padded out, as a call with ``lengths`` is."""

    how = "packed"

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        packed = pack_padded_sequence(self.input, self.control.lengths, enforce_sorted=False)
        output, (h_n, c_n) = self.module(packed, self.hx)
        return pad_packed_sequence(output, total_length=len(self.input))[0], h_n, c_n


class Segments(Side):
    """Resets by ``torch.nn.LSTM`` over the steps from one at which any row is reset to the next, as RL code does it."""

    how = "segments"

    def pieces(self, edges: list[int]) -> Iterable[Tensor]:
        """The input from each edge to the next."""
        return (self.input[start:end] for start, end in pairwise(edges))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.control.reset is not None and self.keep is not None
        starts = self.control.reset.any(1).nonzero().flatten().tolist()
        edges = sorted({0, *starts, len(self.input)})
        outputs, (h, c) = [], self.hx
        for start, piece in zip(edges[:-1], self.pieces(edges), strict=True):
            keep = self.keep[start, :, None]
            output, (h, c) = self.module(piece, (h * keep, c * keep))
            outputs.append(output)
        return torch.cat(outputs), h, c


class SplitSegments(Segments):
    """The same at its best: a slice's gradient is as large as the whole input, those of a split are put together."""

    how = "split segments"

    def pieces(self, edges: list[int]) -> Iterable[Tensor]:
        return self.input.split([end - start for start, end in pairwise(edges)])


class CellLoop(Side):
    """Every control by ``torch.nn.LSTMCell``, step by step; with masks on the states."""

    how = "cell loop"

    def __init__(self, problem: Problem, control: Control = NONE, provider: str = PEER) -> None:
        super().__init__(problem, control, provider)
        case = problem.case
        self.cell = nn.LSTMCell(case.input_size, case.hidden_size, dtype=problem.input.dtype)
        for name, parameter in self.module.named_parameters():
            setattr(self.cell, name.removesuffix("_l0"), parameter)

    def forward(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        h, c = self.hx[0].squeeze(0), self.hx[1].squeeze(0)  # (B, H)
        lengths = self.control.lengths
        outputs, cells = [], []
        for t, row in enumerate(self.input.unbind()):
            if self.keep is not None:
                keep = self.keep[t, :, None]
                h, c = h * keep, c * keep
            new_h, new_c = self.cell(row, (h, c))
            if lengths is None:
                h, c = new_h, new_c
                outputs.append(h)
            else:
                alive = (t < lengths)[:, None]
                h, c = torch.where(alive, new_h, h), torch.where(alive, new_c, c)
                outputs.append(torch.where(alive, h, 0))
            cells.append(c)
        return torch.stack(outputs), h[None], c[None], *((torch.stack(cells),) if self.control.cells else ())


class Sequences(Side):
    """Resets by cutting each row into its sequences, which are packed as one batch for ``torch.nn.LSTM``."""

    how = "packed sequences"

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        reset = self.control.reset
        assert reset is not None
        steps, batch = reset.shape
        begins = reset.clone()
        begins[0] = True
        row, first = begins.T.nonzero(as_tuple=True)  # (S,) each, row by row: where a sequence begins
        last = begins.sum(0).cumsum(0) - 1  # (B,), each row's last sequence
        ends = first.roll(-1)
        ends[last] = steps
        count = ends - first  # (S,)
        source = (first + torch.arange(int(count.max()))[:, None]).clamp_max(steps - 1)  # (L, S)
        # The row's own initial state goes to its first sequence, unless that begins with a reset too.
        mine = ((first == 0) & ~reset[0, row])[:, None].to(self.input.dtype)
        h_0, c_0 = (state[:, row] * mine for state in self.hx)
        packed = pack_padded_sequence(self.input[source, row], count, enforce_sorted=False)
        output, (h_n, c_n) = self.module(packed, (h_0, c_0))
        which = begins.T.flatten().cumsum(0).view(batch, steps).T - 1  # (T, B), the sequence of a step of a row
        place = torch.arange(steps)[:, None] - first[which]  # (T, B), and the step's place in there
        return pad_packed_sequence(output)[0][place, which], h_n[:, last], c_n[:, last]


@dataclass(frozen=True)
class Truth:
    """What everybody has to return for a case under a control, from float64."""

    case: Case
    expected: tuple[Tensor, ...]
    errors: tuple[float, ...]  # torch's own in the case's dtype

    def bound(self, index: int, provider: str) -> float:
        """What one result may be off by: of ours, twice what torch's is and a few roundings, as in bench.verify."""
        dtype = self.case.torch_dtype
        if dtype == torch.float64:
            return FLOAT64_BOUND
        most = SAME_DTYPE_BOUND[dtype]
        floor = FLOOR_EPS[dtype] * torch.finfo(dtype).eps
        return min(FACTOR * self.errors[index] + floor, most) if provider == OURS else most


def truth(case: Case, control: Control = NONE, steps: int | None = None) -> Truth:
    """What is true of a case: ``torch.nn.LSTM`` tells it, or where that has no such control, its cell step by step."""
    kind = Direct if control is NONE else CellLoop
    expected = kind(draw(case, torch.float64, steps), control).training()
    theirs = kind(draw(case, steps=steps), control).training()
    errors = (relative_error(mine, exact) for mine, exact in zip(theirs, expected, strict=True))
    return Truth(case, expected, tuple(errors))


def checked(side: Side, true: Truth) -> Side:
    """The side, once everything that it returns has been compared; raises Mismatch where a bound is broken."""
    provider = side.name.split()[0]
    outputs = (*OUTPUTS, *(("cells",) if side.control.cells else ()))
    for mode in true.case.modes:
        names = outputs + (side.gradient_names if mode == "training" else ())
        got = getattr(side, mode)()
        if len(got) != len(names):
            raise Mismatch(f"{true.case.name}, {side.name}, {mode}: expected {len(names)} results, got {len(got)}")
        for index, name in enumerate(names):
            error, bound = relative_error(got[index], true.expected[index]), true.bound(index, provider)
            if not error <= bound:
                raise Mismatch(
                    f"{true.case.name}, {side.name}, {mode}, {name}: expected an error of at most {bound:.2e} "
                    f"against float64, got {error:.2e}"
                )
    return side


def compare(
    mode: str, variant: str, ours: Side, peer: Side, effort: Effort, kind: str, limit: float | None
) -> ControlRow:
    """Times a mode of the two, which have been checked."""
    case = ours.problem.case
    samples = interleave(getattr(ours, mode), getattr(peer, mode), min_pairs=effort.min_pairs, budget_s=effort.budget_s)
    if kind == "cost":
        scale = peer.tokens / ours.tokens
        ratios = tuple(mine / theirs * scale for mine, theirs in zip(samples.ours, samples.peer, strict=True))
    else:
        ratios = tuple(theirs / mine for mine, theirs in zip(samples.ours, samples.peer, strict=True))
    versions = machine.versions()
    return ControlRow(
        machine.commit(),
        machine.today(),
        versions["torch"],
        versions["numba"],
        machine.device_name(),
        machine.units(),
        case.group,
        case.name,
        mode,
        variant,
        peer.name,
        ours.tokens,
        peer.tokens,
        len(ratios),
        *(percentile(samples.ours, share) * 1e3 for share in (0.2, 0.5, 0.8)),
        *(percentile(samples.peer, share) * 1e3 for share in (0.2, 0.5, 0.8)),
        kind,
        *(percentile(ratios, share) for share in (0.5, 0.2, 0.8)),
        limit,
    )


def resets(case: Case, effort: Effort) -> Iterator[ControlRow]:
    """A mask of resets, from one without any True on, against no mask."""
    problem = draw(case)
    plain = truth(case)
    dense = checked(Direct(problem, provider=OURS), plain)
    for share in SHARES:
        control = Control(reset=draw_reset(case, share))
        ours = checked(Direct(problem, control, OURS), truth(case, control) if share else plain)
        for mode in case.modes:
            yield compare(mode, f"{share:.0%} resets", ours, dense, effort, "cost", COST_LIMIT)


def lengths(case: Case, effort: Effort) -> Iterator[ControlRow]:
    """Lengths against dense calls of as many tokens, and against packing."""
    problem = draw(case)
    true = truth(case)
    dense = checked(Direct(problem, provider=OURS), true)
    full = checked(Direct(problem, Control(torch.full((case.batch,), case.steps)), OURS), true)
    for mode in case.modes:
        yield compare(mode, "all T", full, dense, effort, "cost", COST_LIMIT)
    for variant, each in ragged_lengths(case).items():
        control = Control(each)
        true = truth(case, control)
        ours = checked(Direct(problem, control, OURS), true)
        packed = [checked(Packed(problem, control, OURS), true)]
        if effort.slow or case.name not in SLOW:
            packed.append(checked(Packed(problem, control), true))
        steps = round(ours.tokens / case.batch)
        short = checked(Direct(draw(case, steps=steps), provider=OURS), truth(case, steps=steps))
        for mode in case.modes:
            yield compare(mode, variant, ours, short, effort, "cost", COST_LIMIT)
            for peer in packed:
                yield compare(mode, variant, ours, peer, effort, "speed", None)


def cells(case: Case, effort: Effort) -> Iterator[ControlRow]:
    """Cells that are returned, and those that the loss reads too, against none."""
    problem = draw(case)
    dense = checked(Direct(problem, provider=OURS), truth(case))
    for variant, control in (("returned", Control(cells=True)), ("in the loss", Control(cells=True, cell_loss=True))):
        ours = checked(Direct(problem, control, OURS), truth(case, control))
        for mode in case.modes if not control.cell_loss else ("training",):
            yield compare(mode, variant, ours, dense, effort, "cost", None)


def rollout(case: Case, effort: Effort) -> Iterator[ControlRow]:
    """A training step with resets against what does the same on ``torch.nn``."""
    problem = draw(case)
    control = Control(reset=draw_reset(case, ROLLOUT_SHARE))
    true = truth(case, control)
    ours = checked(Direct(problem, control, OURS), true)
    kinds: list[type[Side]] = [Segments, SplitSegments, CellLoop]
    if effort.slow or case.name not in SLOW:
        kinds.append(Sequences)
    for kind in kinds:
        peer = checked(kind(problem, control), true)
        limit = SPEED_LIMIT if kind is Segments and case.batch >= PROMISED_BATCH else None
        for mode in case.modes:
            yield compare(mode, f"{ROLLOUT_SHARE:.0%} resets", ours, peer, effort, "speed", limit)


EXPERIMENTS: dict[str, Callable[[Case, Effort], Iterator[ControlRow]]] = {
    "reset": resets,
    "lengths": lengths,
    "cells": cells,
    "rollout": rollout,
}


def read(path: Path) -> list[ControlRow]:
    """The rows of a file; none where there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        expected = [field.name for field in fields(ControlRow)]
        if reader.fieldnames != expected:
            raise ValueError(f"{path}: expected the columns {expected}, got {reader.fieldnames}; move the file away")
        kinds = {field.name: str(field.type) for field in fields(ControlRow)}
        return [
            ControlRow(**{name: results._parse(record[name], kinds[name]) for name in expected}) for record in reader
        ]


def merge(old: Sequence[ControlRow], new: Sequence[ControlRow]) -> list[ControlRow]:
    """The old rows with those of the same key replaced; in the order of the cases, without cases that are gone."""
    rank = {name: index for index, name in enumerate(CASES)}
    rows = {row.key: row for row in (*old, *new)}
    return sorted((row for row in rows.values() if row.case in rank), key=lambda row: rank[row.case])


def _ratio(row: ControlRow) -> str:
    """A ratio, coloured where something is promised, with a word where that is broken."""
    text = f"{row.ratio:.3f}" if row.kind == "cost" else f"{row.ratio:.2f}×"
    if row.limit is None:
        return text
    if not row.broken:
        return f"[green]{text}[/]"
    return f"[red]{text} {'over' if row.kind == 'cost' else 'under'} {row.limit:g}[/]"


def show(console: Console, rows: Sequence[ControlRow]) -> None:
    """The table: costs over dense calls as 1.010, speeds against other ways as 3.40×; broken promises in red."""
    table = Table(
        title=f"What sequence control costs: {rows[0].device}, {rows[0].threads} threads, torch {rows[0].torch}",
        caption="medians; ratio: a token's time over the dense call's, or (×) the peer's time over ours",
        box=SIMPLE_HEAD,
    )
    for name in ("experiment", "case", "variant", "mode", "against"):
        table.add_column(name, no_wrap=True)
    for name in ("ms", "peer ms", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last is not None and row.experiment != last.experiment:
            table.add_section()
        table.add_row(
            row.experiment, row.case.removeprefix(f"{row.experiment}-"), row.variant, row.mode, row.peer,
            f"{row.p50_ms:.4g}", f"{row.peer_p50_ms:.4g}", _ratio(row),
        )  # fmt: skip
        last = row
    console.print(table)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.control", description=__doc__.split("\n")[0])
    parser.add_argument("--case", metavar="PATTERN", help="only cases whose names match it or contain it")
    parser.add_argument("--quick", action="store_true", help="some of the cases, fewer repetitions")
    parser.add_argument("--slow", action="store_true", help="also torch's packed training where it takes minutes")
    parser.add_argument("--pairs", type=int, metavar="N", help=f"at least so many pairs (default: {FULL.min_pairs})")
    parser.add_argument("--seconds", type=float, metavar="S", help=f"go on for so long (default: {FULL.budget_s:g})")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"for the rows (default: {OUT})")
    parser.add_argument("--save", action="store_true", help="write the rows to bench/results/ instead")
    parser.add_argument("--list", action="store_true", help="show the cases, and measure none")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    console = screen()
    cases = select(pattern=options.case, quick=options.quick, registry=CASES)
    if not cases:
        console.print("no case matches; --list shows them all")
        return 2
    if options.list:
        console.print("\n".join(case.name for case in cases))
        return 0
    effort = (QUICK if options.quick else FULL)._replace(slow=options.slow)
    if options.pairs is not None:
        effort = effort._replace(min_pairs=options.pairs)
    if options.seconds is not None:
        effort = effort._replace(budget_s=options.seconds)
    folder = (Path(__file__).parent / "results" if options.save else options.out) / "control"
    path = folder / f"{machine.slug()}.csv"
    old = read(path)  # which may raise, before anything is measured
    rows: list[ControlRow] = []
    wrong = []
    try:
        for case in cases:
            try:
                for row in EXPERIMENTS[case.group](case, effort):
                    rows.append(row)
                    console.print(f"{case.name}, {row.variant}, {row.mode}, against {row.peer}: {_ratio(row)}")
            except Mismatch as mismatch:
                wrong.append(str(mismatch))
                console.print(f"[red]wrong result, no figure:[/] {escape(wrong[-1])}")
    except KeyboardInterrupt:
        console.print("interrupted: what was measured is kept")
    if rows:
        show(console, rows)
        results.write(path, merge(old, rows), ControlRow)
        console.print(f"rows: {path}")
    for line in wrong:
        console.print(f"[red]wrong result:[/] {escape(line)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
