"""The Triton backend of the contract: host code, from tensors to launches and back.

A layer is three parts.  Before the recurrence, one large product: z = W_ih x + b_ih + b_hh for all steps.  The
recurrence, one launch for both directions, of the design that ``tiling_gpu.plan`` chooses.  After it, in backward,
large products again: dx, dW_ih, dW_hh, and the sums for the biases.  The large ones are cuBLAS's (``torch.addmm``).

The kernels know neither h_0 nor projections:

* h_0 enters through z: z of a row's first step gets W_hh h_0 added, and dh_0 = W_hh^T dz of that step.
* With a projection, h = W_hr m, the recurrence is one of m with the weights W_hh W_hr, which have the shape that W_hh
  would have without one: one hand-off a step instead of two.  y = W_hr m afterwards, for all steps at once.

Rows are kept flat, (N, ·), in the order that suits the caller: step by step, row by row where the batch is first in
memory, packed where rows are ragged.  Padded ragged tensors are gathered first and scattered last, on the device.

T time, B batch, N alive rows over all steps, I input, H hidden, P projection (H where there is none), D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import tiling_gpu, triton_resident, triton_split
from .contract import Forward, Gradients, Layer, Needs, Rows, WeightGradients, Weights
from .tiling_gpu import Design
from .triton_cell import INTERPRETED

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
BITS = {2: (tl.int16, torch.int16), 4: (tl.int32, torch.int32)}
OLDEST = (8, 0)  # compute capability: tensor cores for bfloat16 and TF32, 8-column tiles
# How often a program looks for another's data before it gives up; a look takes about a microsecond.
PATIENCE = 4_000_000
# For the compiler: left alone it aims at two programs an SM in some kernels, with half the registers, and spills.
HINTS = {"enable_fp_fusion": True, "maxnreg": 255}
JITTER = 0  # nanoseconds of random delay a step, for tests


def supports(layer: Layer) -> str | None:
    """See the contract."""
    if layer.dtype not in DTYPES:
        return f"it computes in float16, bfloat16 and float32, not in {layer.dtype}; use backend='auto' or 'torch'"
    if INTERPRETED.value:
        return None if layer.device.type == "cpu" else "Triton's interpreter is on, which runs on the CPU"
    if layer.device.type != "cuda":
        return f"it runs on NVIDIA GPUs, not on {layer.device}; move module and input there, or use backend='auto'"
    if torch.version.hip is not None:
        return "it was built for NVIDIA GPUs, and this torch is for ROCm; use backend='auto'"
    capability = torch.cuda.get_device_capability(layer.device)
    if capability < OLDEST:
        return (
            f"it needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, and {layer.device} has "
            f"{capability[0]}.{capability[1]}; use backend='auto'"
        )
    try:
        for backward in (False, True):
            _plan(layer.device, layer.dtype, layer.hidden_size, layer.batch, layer.directions, backward)
    except ValueError as error:
        return f"{error}; use backend='auto'"
    return None


def measured(device: torch.device) -> bool:
    """Whether the choice of ``"auto"`` on this device rests on measurements."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in tiling_gpu.MEASURED


def describe(layer: Layer) -> str:
    """The designs that such a layer would run, for people to read."""
    names = [
        str(_plan(layer.device, layer.dtype, layer.hidden_size, layer.batch, layer.directions, backward))
        for backward in (False, True)
    ]
    return f"forward {names[0]}" + (f"; backward {names[1]}" if layer.training else "")


def prewarm(layer: Layer, *, training: bool) -> None:
    """See the contract: compiles by running two steps of zeros."""
    with torch.no_grad():
        steps, D, H, P = 2, layer.directions, layer.hidden_size, layer.proj_size or layer.hidden_size
        make = functools.partial(torch.zeros, device=layer.device, dtype=layer.dtype)
        bias = make(4 * H) if layer.bias else None
        weight_hr = make(P, H) if layer.proj_size else None
        weights = (Weights(make(4 * H, layer.input_size), make(4 * H, P), bias, bias, weight_hr),) * D
        sizes = torch.full((steps,), layer.batch)
        rows = Rows.from_packed(sizes) if layer.ragged else Rows(steps, layer.batch)
        x = make(*rows.shape, layer.input_size)
        result = forward(x, None, None, weights, rows, save=training)
        if training:
            given: dict[str, Any] = {"input": x, "h_0": None, "c_0": None, "weights": weights, "rows": rows}
            backward(result.output, None, None, None, **given, output=result.output, saved=result.saved)


@functools.lru_cache(maxsize=64)
def _sms(device: torch.device) -> int:
    """How many programs can wait for each other: one an SM."""
    return 16 if INTERPRETED.value else torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=64)
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may use."""
    if INTERPRETED.value:
        return tiling_gpu.SHARED
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs leave this one out
    return properties.shared_memory_per_block_optin


def _tf32() -> bool:
    """Whether torch's setting for RNNs allows TF32."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _plan(device: torch.device, dtype: torch.dtype, hidden: int, batch: int, directions: int, backward: bool) -> Design:
    precision = tiling_gpu.precision_of(dtype, _tf32())
    return tiling_gpu.plan(hidden, batch, directions, precision, _sms(device), backward, shared=_shared(device))


@contextmanager
def _products(dtype: torch.dtype) -> Iterator[None]:
    """The large products in the precision that torch's setting for RNNs asks for, as cuDNN would take them."""
    matmul = torch.backends.cuda.matmul
    wanted = "tf32" if _tf32() else "ieee"
    if dtype != torch.float32 or (before := matmul.fp32_precision) == wanted:
        yield
        return
    matmul.fp32_precision = wanted
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _Status:
    """The word in which kernels say that a wait gave up, one a device; the host reads it without waiting."""

    words: dict[torch.device, Tensor] = {}  # noqa: RUF012

    @classmethod
    def word(cls, device: torch.device) -> Tensor:
        if device not in cls.words:  # page-locked: written by the device, readable by the host
            cls.words[device] = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        return cls.words[device]

    @classmethod
    def check(cls, device: torch.device) -> Tensor:
        """Raises RuntimeError if an earlier call on ``device`` gave up."""
        word = cls.word(device)
        if word.item():
            word.zero_()
            raise RuntimeError(
                f"an LSTM kernel of an earlier call on {device} gave up waiting for another part of itself: its "
                f"results are NaN from there on. Its programs were not running at the same time, as they have to: "
                f"is the device shared with other processes (MPS), or being debugged? backend='torch' does not need it"
            )
        return word


class _Problem:
    """The sizes of a call and how its rows lie; ``flat`` and ``unflat`` convert to and from the kernels' order."""

    def __init__(self, input: Tensor, weights: tuple[Weights, ...], rows: Rows, reset: Tensor | None) -> None:
        self.rows, self.weights = rows, weights
        self.device, self.dtype = input.device, input.dtype
        self.directions = len(weights)
        self.steps, self.batch, self.total = rows.steps, rows.batch, rows.total
        self.inputs = input.shape[-1]
        self.hidden, self.width = weights[0].weight_hh.shape[0] // 4, weights[0].weight_hh.shape[1]
        self.projected = weights[0].weight_hr is not None
        self.ragged = rows.batch_sizes is not None
        self.by_row = rows.batch_first and not self.ragged  # a row's steps lie behind each other
        self.step, self.stride = (1, self.steps) if self.by_row else (self.batch, 1)
        self.index: Tensor | None = None  # (N,) of padded ragged rows: where they lie in the caller's tensor
        self.order: Tensor | None = None  # (B,) of padded ragged rows: the caller's row of each of ours
        self.offsets: Tensor | None = None
        if rows.batch_sizes is not None:
            self._ragged(rows, rows.batch_sizes)
        self.reset = None if reset is None else self.flat(reset.unsqueeze(-1)).squeeze(-1).view(torch.uint8)

    def _ragged(self, rows: Rows, batch_sizes: Tensor) -> None:
        sizes = batch_sizes.to("cpu")
        ends = torch.cumsum(sizes, 0)
        self.starting = int(sizes[0])  # rows with a step at all
        lengths = (sizes[:, None] > torch.arange(self.starting)).sum(0)
        last = (ends - sizes)[lengths - 1] + torch.arange(self.starting) if self.starting else lengths
        table = torch.cat([torch.zeros(1, dtype=torch.int64), ends, last]).to(self.device)
        self.offsets, self._last = table[: self.steps + 1], table[self.steps + 1 :]
        # of each packed row: its step and its place in the step
        self._step_of = torch.repeat_interleave(
            torch.arange(self.steps, device=self.device), sizes.to(self.device), output_size=self.total
        )
        self._row_of = torch.arange(self.total, device=self.device) - self.offsets[self._step_of]
        if not rows.packed:
            assert rows.order is not None
            self.order = rows.order.to(self.device)
            user = self.order[self._row_of]
            by_row = user * self.steps + self._step_of
            self.index = by_row if rows.batch_first else self._step_of * self.batch + user

    def flat(self, tensor: Tensor) -> Tensor:
        """(N, ·), contiguous, in the kernels' order, from a tensor of the caller's rows."""
        if self.rows.packed:
            return tensor.contiguous()
        if self.rows.batch_first:
            tensor = tensor.transpose(0, 1)
        flat = tensor.reshape(self.steps * self.batch, tensor.shape[-1])
        return flat.contiguous() if self.index is None else flat.index_select(0, self.index)

    def unflat(self, flat: Tensor) -> Tensor:
        """The inverse of :meth:`flat`, zero where rows are padded; shares memory with ``flat`` where it can."""
        if self.rows.packed:
            return flat
        shape = (self.batch, self.steps) if self.rows.batch_first else (self.steps, self.batch)
        if self.index is not None:
            dense = flat.new_zeros(self.steps * self.batch, flat.shape[-1])
            flat = dense.index_copy_(0, self.index, flat)
        result = flat.view(*shape, flat.shape[-1])
        return result.transpose(0, 1) if self.rows.batch_first else result

    def sorted(self, state: Tensor) -> Tensor:
        """(D, B, ·) in the kernels' order of rows."""
        return state if self.order is None else state.index_select(1, self.order)

    def unsorted(self, state: Tensor) -> Tensor:
        """The inverse of :meth:`sorted`."""
        return state if self.order is None else torch.empty_like(state).index_copy_(1, self.order, state)

    def stepwise(self, flat: Tensor) -> Tensor:
        """(T, B, ·): a view of dense (N, ·)."""
        if self.by_row:
            return flat.view(self.batch, self.steps, -1).transpose(0, 1)
        return flat.view(self.steps, self.batch, -1)

    def take(self, flat: Tensor, direction: int, first: bool) -> Tensor:
        """(B', ·): what each of the B' rows with a step has at the first or last step of its walk; maybe a view."""
        at_zero = first == (direction == 0)
        if not self.ragged:
            return self.stepwise(flat)[0 if at_zero else -1]
        return flat[: self.starting] if at_zero else flat.index_select(0, self._last)

    def add_at_first(self, flat: Tensor, direction: int, left: Tensor, right: Tensor) -> None:
        """Adds ``left @ right`` (B', ·) to what each row has at the first step of its walk."""
        if not self.ragged or direction == 0:
            self.take(flat, direction, True).addmm_(left, right)
        else:
            flat.index_copy_(0, self._last, torch.addmm(flat.index_select(0, self._last), left, right))

    def states_before(self, y: Tensor, h_0: Tensor | None, direction: int) -> Tensor:
        """(N, P): the h that entered each step, from (N, P) y of one direction and (B', P) h_0."""
        if self.ragged:
            before = self._neighbour(-1 if direction == 0 else 1)
            result = y.index_select(0, before)
            first = torch.zeros_like(result[: self.starting]) if h_0 is None else h_0
            if direction == 0:
                result[: self.starting] = first
            else:
                result.index_copy_(0, self._last, first)
        else:
            result = y.new_empty(y.shape)
            view, source = self.stepwise(result), self.stepwise(y)
            if direction == 0:
                view[1:], rest = source[:-1], view[0]
            else:
                view[:-1], rest = source[1:], view[-1]
            rest.copy_(h_0) if h_0 is not None else rest.zero_()
        return result if self.reset is None else result.masked_fill_(self.reset[:, None] != 0, 0)

    def from_after(self, g: Tensor, h_n: Tensor | None, direction: int) -> Tensor:
        """(N, P): what each h_t gets from the step after, from the gradients (N, P) of the h that entered each step.

        The transpose of :meth:`states_before`; rows end in ``h_n`` (B', P).
        """
        if self.reset is not None:
            g = g.masked_fill(self.reset[:, None] != 0, 0)
        if self.ragged:
            result = g.index_select(0, self._neighbour(1 if direction == 0 else -1))
            last = torch.zeros_like(result[: self.starting]) if h_n is None else h_n
            if direction == 1:
                result[: self.starting] = last
            else:
                result.index_copy_(0, self._last, last)
            return result
        result = g.new_empty(g.shape)
        view, source = self.stepwise(result), self.stepwise(g)
        if direction == 0:
            view[:-1], rest = source[1:], view[-1]
        else:
            view[1:], rest = source[:-1], view[0]
        rest.copy_(h_n) if h_n is not None else rest.zero_()
        return result

    def _neighbour(self, steps: int) -> Tensor:
        """(N,): where the same row lies one step later or earlier; anywhere where it has no such step."""
        assert self.offsets is not None
        step = (self._step_of + steps).clamp_(0, self.steps - 1)
        return (self.offsets[step] + self._row_of).clamp_(max=self.total - 1)

    def recurrent_weights(self) -> Tensor:
        """(D, 4H, H): W_hh, or W_hh W_hr."""
        each = [w.weight_hh if w.weight_hr is None else w.weight_hh @ w.weight_hr for w in self.weights]
        return each[0].contiguous()[None] if len(each) == 1 else torch.stack(each)

    @property
    def row(self) -> int:
        """H': entries of a row that is read 16 bytes at a time."""
        return (self.hidden + 7) // 8 * 8

    def design(self, backward: bool) -> Design:
        return _plan(self.device, self.dtype, self.hidden, self.batch, self.directions, backward)

    def channel(self, *shape: int) -> Tensor:
        """Integers of the dtype's size, all -1: nothing written yet."""
        return torch.full(shape, -1, dtype=BITS[self.dtype.itemsize][1], device=self.device)

    def launch(
        self, backward: bool, design: Design, tensors: list[Tensor | None], entered: bool = False, **flags: bool
    ) -> None:
        """Runs the recurrence; ``tensors`` are the kernel's up to ``w_hh``, in its order, None where not wanted.

        ``entered`` (forward): what h_0 adds is in z already.
        """
        module = triton_resident if design.kind == "resident" else triton_split
        nothing = tensors[0]
        tensors = [nothing if tensor is None else tensor for tensor in (*tensors, self.reset, self.offsets)]
        constants = {
            "H": self.hidden,
            "D": self.directions,
            "U": design.units,
            "BT": design.tile,
            "KW": design.warps,
            "HAS_RESET": self.reset is not None,
            "RAGGED": self.ragged,
            "PRECISION": "tf32" if _tf32() else "tf32x3",
            "DTYPE": DTYPES[self.dtype],
            "num_warps": design.warps,
            **(HINTS if not INTERPRETED.value else {}),
        } | flags
        kernel = module.lstm_bwd_kernel if backward else module.lstm_fwd_kernel
        sizes = (self.steps, self.batch, self.total)
        strides = (self.step, self.stride) if backward else (int(entered), self.step, self.stride)
        grid = (design.programs,)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if design.kind == "resident":
                kernel[grid](*tensors, *sizes, *strides, **constants)
                return
            constants |= {"K": design.chunk, "NK": design.chunks, "STREAM": design.stream, "JITTER": JITTER}
            if not backward:
                constants["H_ROW"] = self.row
            constants["BITS"] = BITS[self.dtype.itemsize][0]
            shares = (design.groups, design.tiles, design.rows, PATIENCE)
            if not INTERPRETED.value:
                constants["launch_cooperative_grid"] = True
            if design.slices == 1 or not INTERPRETED.value:
                try:
                    kernel[grid](*tensors, *sizes, 0, self.steps, *shares, *strides, **constants)
                    return
                except RuntimeError as error:
                    if "cooperative" not in str(error):
                        raise
                    del constants["launch_cooperative_grid"]
            for i in range(self.steps):  # a launch a step waits for nobody
                kernel[grid](*tensors, *sizes, i, i + 1, *shares, *strides, **constants)


def forward(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: tuple[Weights, ...],
    rows: Rows,
    *,
    reset: Tensor | None = None,
    save: bool = False,
    cells: bool = False,
) -> Forward:
    """See the contract."""
    status = _Status.check(input.device)
    problem = _Problem(input, weights, rows, reset)
    N, D, H, P, batch = problem.total, problem.directions, problem.hidden, problem.width, problem.batch
    x = problem.flat(input)
    new = input.new_empty
    design = problem.design(backward=False)
    keep_cells = save or cells

    gates = new(D, N, 4 * H)
    with _products(problem.dtype):
        for d, w in enumerate(weights):
            if w.bias_ih is None or w.bias_hh is None:
                torch.mm(x, w.weight_ih.T, out=gates[d])
            else:
                torch.addmm(w.bias_ih + w.bias_hh, x, w.weight_ih.T, out=gates[d])
            if h_0 is not None:
                problem.add_at_first(gates[d], d, _entering(problem, h_0, d), w.weight_hh.T)
        recurrent = problem.recurrent_weights()

    if c_0 is None:
        c = torch.zeros(D, batch, H, dtype=torch.float32, device=problem.device)
    else:
        c = problem.sorted(c_0).to(torch.float32, copy=True).contiguous()
    kept = new(D, N, H, dtype=torch.float32) if keep_cells else None
    if design.kind == "resident":
        m = new(N, D * H)
        tensors = [m, gates, kept, c, recurrent]
    else:
        bits = problem.channel(N, D, problem.row)
        bits[..., H:] = 0  # nobody writes these, and nobody may wait for them
        m = bits.view(problem.dtype)[..., :H]
        padded = torch.nn.functional.pad(recurrent, (0, problem.row - H))
        tensors = [bits, bits.view(torch.int32), gates, kept, c, status, padded.view(torch.int32)]
    problem.launch(False, design, tensors, entered=h_0 is not None, SAVE=keep_cells)
    m = m.reshape(N, D * H).contiguous()

    y = m
    if problem.projected:
        y = new(N, D * P)
        with _products(problem.dtype):
            for d, w in enumerate(weights):
                assert w.weight_hr is not None
                torch.mm(m[:, d * H : (d + 1) * H], w.weight_hr.T, out=y[:, d * P : (d + 1) * P])
    h_n = new(D, batch, P)
    for d in range(D):
        ended = problem.take(y, d, False)[:, d * P : (d + 1) * P]
        h_n[d, : len(ended)] = ended
        if len(ended) < batch:  # rows without a step end where they begin
            h_n[d, len(ended) :] = 0 if h_0 is None else problem.sorted(h_0)[d, len(ended) :]
    all_cells = None
    if cells:
        assert kept is not None
        all_cells = problem.unflat(kept.permute(1, 0, 2).reshape(N, D * H).clone())
    saved = (gates, kept, *([m] if problem.projected else [])) if save else ()
    return Forward(problem.unflat(y), problem.unsorted(h_n), problem.unsorted(c).to(problem.dtype), all_cells, saved)  # type: ignore[arg-type]


def _entering(problem: _Problem, h_0: Tensor, direction: int) -> Tensor:
    """(B', P): h_0 of the rows with a step, zero where the first step is reset."""
    h = problem.sorted(h_0)[direction]
    if problem.ragged:
        h = h[: problem.starting]
    if problem.reset is not None:
        h = h.masked_fill(problem.take(problem.reset[:, None], direction, True) != 0, 0)
    return h


def backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    *,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: tuple[Weights, ...],
    output: Tensor,
    saved: tuple[Tensor, ...],
    rows: Rows,
    reset: Tensor | None = None,
    needs: Needs = Needs(),  # noqa: B008 (immutable)
    norms: bool = False,
) -> Gradients:
    """See the contract."""
    status = _Status.check(input.device)
    problem = _Problem(input, weights, rows, reset)
    N, D, H, P, batch, T = (
        problem.total, problem.directions, problem.hidden, problem.width, problem.batch, problem.steps,
    )  # fmt: skip
    gates, cells, *projected = saved
    design = problem.design(backward=True)
    new = input.new_empty
    dy = None if grad_output is None else problem.flat(grad_output)
    dh_n = None if grad_h_n is None else problem.sorted(grad_h_n).contiguous()
    dm, dm_n = dy, dh_n  # of m = o tanh(c): of h where there is no projection
    with _products(problem.dtype):
        if problem.projected:
            each = [w.weight_hr for w in weights]
            if dy is not None:
                dm = torch.cat([dy[:, d * P : (d + 1) * P] @ w for d, w in enumerate(each)], 1)  # type: ignore[operator]
            if dh_n is not None:
                dm_n = torch.stack([dh_n[d] @ w for d, w in enumerate(each)])  # type: ignore[operator]
        recurrent = problem.recurrent_weights()
    if grad_c_n is None:
        dc = torch.zeros(D, batch, H, dtype=torch.float32, device=problem.device)
    else:
        dc = problem.sorted(grad_c_n).to(torch.float32, copy=True).contiguous()
    dcells = None if grad_cells is None else problem.flat(grad_cells)
    c_first = None if c_0 is None else problem.sorted(c_0).contiguous()
    squares = None
    if norms:
        squares = torch.zeros(2, D, design.slices, T, batch, dtype=torch.float32, device=problem.device)
    flags = {
        "HAS_DY": dm is not None,
        "HAS_DH_N": dm_n is not None,
        "HAS_DCELLS": dcells is not None,
        "HAS_C_0": c_first is not None,
        "NORMS": norms,
    }
    others = [dm, dm_n, dcells, gates, cells, c_first, recurrent]
    if design.kind == "resident":
        dz = new(D, N, 4 * H)
        tensors = [dz, dc, squares, *others]
    else:
        bits = problem.channel(D, N, 4 * H)
        dz = bits.view(problem.dtype)
        tensors = [bits, bits.view(torch.int32), dc, squares, status, *others]
    problem.launch(True, design, tensors, **flags)

    y = problem.flat(output)
    x = problem.flat(input) if needs.weights else None
    dx: Tensor | None = None
    dh_0 = new(D, batch, P) if needs.h_0 else None
    gradients = []
    arrived = []  # the norms of what arrives at h_t, where the kernel knows m only
    with _products(problem.dtype):
        for d, w in enumerate(weights):
            dz_d = dz[d]
            if needs.input:
                dx = dz_d @ w.weight_ih if dx is None else dx.addmm_(dz_d, w.weight_ih)
            if dh_0 is not None:
                entering = problem.take(dz_d, d, True) @ w.weight_hh
                if problem.reset is not None:
                    entering = entering.masked_fill_(problem.take(problem.reset[:, None], d, True) != 0, 0)
                dh_0[d, : len(entering)] = entering
                dh_0[d, len(entering) :] = 0 if dh_n is None else dh_n[d, len(entering) :]
            dh = None
            if problem.projected and (needs.weights or norms):
                ends = None if dh_n is None else dh_n[d, : problem.starting if problem.ragged else None]
                dh = problem.from_after(dz_d @ w.weight_hh, ends, d)
                if dy is not None:
                    dh += dy[:, d * P : (d + 1) * P]
                arrived.append(dh)
            if not needs.weights:
                gradients.append(WeightGradients())
                continue
            assert x is not None
            before = problem.states_before(
                y[:, d * P : (d + 1) * P], None if h_0 is None else _entering(problem, h_0, d), d
            )
            bias = dz_d.sum(0, dtype=torch.float32).to(problem.dtype) if w.bias_ih is not None else None
            gradients.append(
                WeightGradients(
                    dz_d.T @ x,
                    dz_d.T @ before,
                    bias,
                    None if bias is None else bias.clone(),
                    dh.T @ projected[0][:, d * H : (d + 1) * H] if dh is not None else None,
                )
            )
    return Gradients(
        None if dx is None else problem.unflat(dx),
        None if dh_0 is None else problem.unsorted(dh_0),
        problem.unsorted(dc).to(problem.dtype) if needs.c_0 else None,
        tuple(gradients),
        None if squares is None else _magnitudes(problem, squares, arrived),
    )


def _magnitudes(problem: _Problem, squares: Tensor, arrived: list[Tensor]) -> Tensor:
    """(2, D, T, B) norms from (2, D, slices, T, B) sums of squares; with a projection, those of h from ``arrived``."""
    result = squares.sum(2).sqrt_()
    for d, dh in enumerate(arrived):
        norm = torch.linalg.vector_norm(dh, dim=1, dtype=torch.float32)
        if problem.ragged:
            result[0, d, problem._step_of, problem._row_of] = norm
        else:
            result[0, d] = problem.stepwise(norm[:, None]).squeeze(-1)
    return result if problem.order is None else torch.empty_like(result).index_copy_(-1, problem.order, result)
