"""What sequence control costs: ``lengths``, ``reset`` and ``return_cells`` of a call, and what they save.

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

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench import tables, verify
from bench.cases import Case
from bench.measure import Experiment, Task, quantiles, ratio_columns, row_of, timed
from bench.providers import OURS, OUTPUTS, PEER, Problem, Runner, build, draw
from bench.rows import COST, SPEED, Row
from bench.timing import Effort
from bench.verify import FACTOR, FLOAT64_BOUND, FLOOR_EPS, SAME_DTYPE_BOUND, relative_error

BACKEND = "numba"  # by name, also of the dense calls: "auto" may leave those to torch
COST_LIMIT = 1.03  # of resets and of lengths, what the project promises: time over that of the dense call
SPEED_LIMIT = 3.0  # of the rollout over the segment loop: its time over ours
SHARES = (0.0, 0.03, 0.30)  # of the steps that begin with a reset
ROLLOUT_SHARE = 0.03
PROMISED_BATCH = 128  # smaller rollouts have longer segments; they are measured, but nothing is promised of them


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
        bounds = [true.bound(index, provider) for index in range(len(names))]
        what = f"{true.case.name}, {side.name}, {mode}"
        verify.compare(what, names, getattr(side, mode)(), true.expected[: len(names)], bounds, "float64")
    return side


def compare(
    mode: str, variant: str, ours: Side, peer: Side, task: Task, kind: str, limit: float | None
) -> Iterator[Row]:
    """Times a mode of the two, which have been checked; a row, unless another mode is wanted."""
    case = ours.problem.case
    if mode not in task.modes(case):
        return
    samples = timed(case, getattr(ours, mode), getattr(peer, mode), task.effort)
    yield row_of(
        "control",
        case,
        mode,
        variant=variant,
        backend=BACKEND,
        peer=peer.name,
        pairs=len(samples.ours),
        **quantiles(samples.ours),
        **quantiles(samples.peer, "peer_"),
        **ratio_columns(samples, kind, peer.tokens / ours.tokens),
        limit=limit,
        details={"tokens": str(ours.tokens), "peer_tokens": str(peer.tokens)},
    )


def resets(case: Case, task: Task) -> Iterator[Row]:
    """A mask of resets, from one without any True on, against no mask."""
    problem = draw(case)
    plain = truth(case)
    dense = checked(Direct(problem, provider=OURS), plain)
    for share in SHARES:
        control = Control(reset=draw_reset(case, share))
        ours = checked(Direct(problem, control, OURS), truth(case, control) if share else plain)
        for mode in case.modes:
            yield from compare(mode, f"{share:.0%} resets", ours, dense, task, COST, COST_LIMIT)


def lengths(case: Case, task: Task) -> Iterator[Row]:
    """Lengths against dense calls of as many tokens, and against packing."""
    problem = draw(case)
    true = truth(case)
    dense = checked(Direct(problem, provider=OURS), true)
    full = checked(Direct(problem, Control(torch.full((case.batch,), case.steps)), OURS), true)
    for mode in case.modes:
        yield from compare(mode, "all T", full, dense, task, COST, COST_LIMIT)
    for variant, each in ragged_lengths(case).items():
        control = Control(each)
        true = truth(case, control)
        ours = checked(Direct(problem, control, OURS), true)
        packed = [checked(Packed(problem, control, OURS), true)]
        if task.slow or "slow" not in case.tags:
            packed.append(checked(Packed(problem, control), true))
        steps = round(ours.tokens / case.batch)
        short = checked(Direct(draw(case, steps=steps), provider=OURS), truth(case, steps=steps))
        for mode in case.modes:
            yield from compare(mode, variant, ours, short, task, COST, COST_LIMIT)
            for peer in packed:
                yield from compare(mode, variant, ours, peer, task, SPEED, None)


def cells(case: Case, task: Task) -> Iterator[Row]:
    """Cells that are returned, and those that the loss reads too, against none."""
    problem = draw(case)
    dense = checked(Direct(problem, provider=OURS), truth(case))
    for variant, control in (("returned", Control(cells=True)), ("in the loss", Control(cells=True, cell_loss=True))):
        ours = checked(Direct(problem, control, OURS), truth(case, control))
        for mode in case.modes if not control.cell_loss else ("training",):
            yield from compare(mode, variant, ours, dense, task, COST, None)


def rollout(case: Case, task: Task) -> Iterator[Row]:
    """A training step with resets against what does the same on ``torch.nn``."""
    problem = draw(case)
    control = Control(reset=draw_reset(case, ROLLOUT_SHARE))
    true = truth(case, control)
    ours = checked(Direct(problem, control, OURS), true)
    kinds: list[type[Side]] = [Segments, SplitSegments, CellLoop]
    if task.slow or "slow" not in case.tags:
        kinds.append(Sequences)
    for kind in kinds:
        peer = checked(kind(problem, control), true)
        limit = SPEED_LIMIT if kind is Segments and case.batch >= PROMISED_BATCH else None
        for mode in case.modes:
            yield from compare(mode, f"{ROLLOUT_SHARE:.0%} resets", ours, peer, task, SPEED, limit)


KINDS: dict[str, Callable[[Case, Task], Iterator[Row]]] = {
    "reset": resets,
    "lengths": lengths,
    "cells": cells,
    "rollout": rollout,
}


def measure(case: Case, task: Task) -> Iterator[Row]:
    """What the case's group asks."""
    return KINDS[case.group](case, task)


CONTROL = Experiment(
    name="control",
    what="what lengths, resets and returned cells of a call cost, and what they save",
    times="a call",
    measure=measure,
    full={"cpu": Effort(7, 0.6)},
    quick={"cpu": Effort(3, 0.1)},
    backend={"cpu": BACKEND},
    details={
        "tokens": "steps that ours computes, over all rows; a cost is of a token's time",
        "peer_tokens": "the same of the peer",
    },
    show=tables.show_promised,
)
