"""The Triton backend of the contract: host code, from tensors to launches and back.

A layer is three parts.  Before the recurrence, one large product: z = W_ih x + b_ih + b_hh for all steps.  The
recurrence, one launch for both directions, of the design that ``tiling.plan`` chooses.  After it, in backward,
large products again: dx, dW_ih, dW_hh, and the sums for the biases.  The large ones are cuBLAS's (``torch.addmm``).

The kernels know neither h_0 nor projections:

* h_0 enters through z: z of a row's first step gets W_hh h_0 added, and dh_0 = W_hh^T dz of that step.
* With a projection, h = W_hr m, the recurrence is one of m with the weights W_hh W_hr, which have the shape that W_hh
  would have without one: one hand-off a step instead of two.  y = W_hr m afterwards, for all steps at once.

Rows are kept flat (``flat_rows.py``).  A dense call can be captured into a CUDA graph, after one outside of it; where
the host knows the lengths it copies a table from there.  The host waits for nothing, whoever knows them: what goes
wrong on the device is told by a later call (``_Status``).

T time, B batch, N alive rows over all steps (with lengths on the device: T * B, of which the last are no rows, see
``flat_rows.py``), I input, H hidden, P projection (H where there is none), D directions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..contract import Forward, GateStatistics, Gradients, Layer, Needs, Rows, WeightGradients, Weights
from ..gate_statistics import sampled_rows, statistics
from . import persistent, split, tiling
from .device import INTERPRETED
from .flat_rows import FlatRows
from .tiling import Design

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
BITS = {2: (tl.int16, torch.int16), 4: (tl.int32, torch.int32)}
OLDEST = (8, 0)  # compute capability: tensor cores for bfloat16 and TF32, 8-column tiles
# How often a program looks for another's data before it gives up; a look takes about a microsecond.
PATIENCE = 4_000_000
JITTER = 0  # nanoseconds of random delay a step, for tests


def hints(warps: int) -> dict[str, Any]:
    """For the compiler: left alone it aims at two programs an SM in some kernels, on half the registers, and spills."""
    return {"enable_fp_fusion": True, "maxnreg": min(255, 65536 // (32 * warps))}


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


def saves(layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """See the contract: the gates, the cells, and with a projection what it is of."""
    D, H = layer.directions, layer.hidden_size
    shapes = [((D, room, 4 * H), layer.dtype), ((D, room, H), torch.float32), ((room, D * H), layer.dtype)]
    return shapes if layer.proj_size else shapes[:2]


def measured(device: torch.device) -> bool:
    """Whether the choice of ``"auto"`` on this device rests on measurements."""
    if device.type != "cuda" or INTERPRETED.value:
        return False
    least = tiling.MEASURED.get(torch.cuda.get_device_capability(device))
    return least is not None and _sms(device) >= least


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
        return tiling.SHARED
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs leave this one out
    return properties.shared_memory_per_block_optin


def _tf32() -> bool:
    """Whether torch's setting for RNNs allows TF32."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _plan(device: torch.device, dtype: torch.dtype, hidden: int, batch: int, directions: int, backward: bool) -> Design:
    precision = tiling.precision_of(dtype, _tf32())
    return tiling.plan(hidden, batch, directions, precision, _sms(device), backward, shared=_shared(device))


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
    """What went wrong on a device, in words that the host reads without waiting: told by a later call, if not the next.

    Kernels set the first, when a wait gave up.  The second is a copy of a count on the device, of rows whose lengths
    were out of range: added to, never set, so that a call in which all is well does not undo what one before it said.
    """

    words: dict[torch.device, Tensor] = {}  # noqa: RUF012
    wrong_lengths: dict[torch.device, tuple[Tensor, Tensor]] = {}  # noqa: RUF012 (there, and its copy)
    told: dict[torch.device, int] = {}  # noqa: RUF012 (of those, how many have been told)

    @staticmethod
    def _readable(device: torch.device) -> Tensor:
        """A zero that is page-locked: written by the device, readable by the host."""
        with torch.inference_mode(False):  # what is made in that mode cannot be cleared outside of it
            return torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")

    @classmethod
    def word(cls, device: torch.device) -> Tensor:
        if device not in cls.words:
            cls.words[device] = cls._readable(device)
        return cls.words[device]

    @classmethod
    def note(cls, device: torch.device, wrong: Tensor) -> None:
        """Counts the rows that are ``wrong`` (B, 1), without waiting."""
        if device not in cls.wrong_lengths:
            with torch.inference_mode(False):  # what is made in that mode cannot be added to outside of it
                count = torch.zeros(1, dtype=torch.int32, device=device)
                cls.wrong_lengths[device] = count, cls._readable(device)
        count, copy = cls.wrong_lengths[device]
        wrong = wrong.squeeze(1)
        count.index_add_(0, torch.zeros_like(wrong, dtype=torch.int64), wrong.to(torch.int32))  # atomic: streams
        copy.copy_(count, non_blocking=True)

    @classmethod
    def check(cls, device: torch.device) -> Tensor:
        """The word for kernels.  RuntimeError if an earlier call on ``device`` gave up, ValueError for its lengths."""
        word = cls.word(device)
        if word.item():
            word.zero_()
            raise RuntimeError(
                f"an LSTM kernel of an earlier call on {device} gave up waiting for another part of itself: its "
                f"results are NaN from there on. Its programs were not running at the same time, as they have to: "
                f"is the device shared with other processes (MPS), or being debugged? backend='torch' does not need it"
            )
        if device in cls.wrong_lengths:
            _, copy = cls.wrong_lengths[device]
            if copy.item() > cls.told.get(device, 0):
                if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                    torch.cuda.synchronize(device)  # other layers of that call may still be at it: told once
                cls.told[device] = int(copy.item())
                raise ValueError(
                    f"lengths should be from 0 to T, the steps of input; those of an earlier call on {device}, or of "
                    f"an earlier layer of this one, were not, and its results are NaN in the rows in question. Nothing "
                    f"waits for lengths that are on the device, so this could not be told before. Pass them on the CPU "
                    f"(lengths.cpu()) to find the call: there they are checked at once"
                )
        return word


class _Recurrence:
    """The sizes of a call, its design, and the launch of its recurrence."""

    def __init__(self, input: Tensor, weights: tuple[Weights, ...], rows: FlatRows, backward: bool) -> None:
        self.weights, self.rows = weights, rows
        self.device, self.dtype = input.device, input.dtype
        self.directions = len(weights)
        self.hidden, self.width = weights[0].weight_hh.shape[0] // 4, weights[0].weight_hh.shape[1]  # H, P
        self.projected = weights[0].weight_hr is not None
        self.backward = backward
        self.design = _plan(self.device, self.dtype, self.hidden, rows.batch, self.directions, backward)

    def recurrent_weights(self) -> Tensor:
        """(D, 4H, H): W_hh, or W_hh W_hr."""
        each = [w.weight_hh if w.weight_hr is None else w.weight_hh @ w.weight_hr for w in self.weights]
        return each[0].contiguous()[None] if len(each) == 1 else torch.stack(each)

    @property
    def row(self) -> int:
        """H': entries of a row that is read 16 bytes at a time."""
        return (self.hidden + 7) // 8 * 8

    def channel(self, *shape: int, dim: int) -> Tensor:
        """Integers of the dtype's size, all -1: nothing written yet; 0 in the tail of N, which is ``shape[dim]``."""
        dtype, tail = BITS[self.dtype.itemsize][1], self.rows.tail
        if tail is None:
            return torch.full(shape, -1, dtype=dtype, device=self.device)
        return (tail.to(dtype) - 1).view(-1, *[1] * (len(shape) - dim - 1)).expand(shape).contiguous()

    def launch(self, tensors: list[Tensor | None], entered: bool = False, **flags: bool) -> None:
        """Runs the recurrence; ``tensors`` are the kernel's up to the weights, in its order, None where not wanted.

        ``entered`` (forward): what h_0 adds is in z already.
        """
        design, backward, rows = self.design, self.backward, self.rows
        module = persistent if design.kind == "resident" else split
        nothing = tensors[0]
        tensors = [nothing if tensor is None else tensor for tensor in (*tensors, rows.reset, rows.offsets)]
        constants = {
            "H": self.hidden,
            "D": self.directions,
            "U": design.units,
            "BT": design.tile,
            "KW": design.warps,
            "HAS_RESET": rows.reset is not None,
            "RAGGED": rows.ragged,
            "PRECISION": "tf32x3" if self.dtype == torch.float32 and not _tf32() else "tf32",
            "DTYPE": DTYPES[self.dtype],
            "num_warps": design.warps,
            **(hints(design.warps) if not INTERPRETED.value else {}),
        } | flags
        kernel = module.lstm_bwd_kernel if backward else module.lstm_fwd_kernel
        sizes = (rows.steps, rows.batch, rows.total)
        strides = (rows.step, rows.stride) if backward else (int(entered), rows.step, rows.stride)
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
                    kernel[grid](*tensors, *sizes, 0, rows.steps, *shares, *strides, **constants)
                    return
                except RuntimeError as error:
                    if "cooperative" not in str(error):
                        raise
                    del constants["launch_cooperative_grid"]
            for i in range(rows.steps):  # a launch a step waits for nobody
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
    flat = FlatRows(rows, input.device, reset)
    call = _Recurrence(input, weights, flat, backward=False)
    N, D, H, P, batch, dtype = flat.total, call.directions, call.hidden, call.width, flat.batch, call.dtype
    new = input.new_empty
    keep_cells = save or cells

    x = flat.flat(input)
    gates = new(D, N, 4 * H)
    with _products(dtype):
        for d, w in enumerate(weights):
            if w.bias_ih is None or w.bias_hh is None:
                torch.mm(x, w.weight_ih.T, out=gates[d])
            else:
                torch.addmm(w.bias_ih + w.bias_hh, x, w.weight_ih.T, out=gates[d])
            if h_0 is not None:
                flat.add_at_first(gates[d], d, flat.entering(h_0, d), w.weight_hh.T)
        recurrent = call.recurrent_weights()

    if c_0 is None:
        c = torch.zeros(D, batch, H, dtype=torch.float32, device=input.device)
    else:
        c = flat.sorted(c_0).to(torch.float32, copy=True).contiguous()
    if flat.wrong is not None:
        _Status.note(call.device, flat.wrong)
        c.masked_fill_(flat.wrong, torch.nan)  # no number of theirs shall look right
    kept = new(D, N, H, dtype=torch.float32) if keep_cells else None
    if call.design.kind == "resident":
        m = flat.new(input, N, D * H)
        tensors = [m, gates, kept, c, recurrent]
    else:
        bits = call.channel(N, D, call.row, dim=0)
        m = bits.view(dtype)[..., :H]
        if call.row > H:
            bits[..., H:] = 0  # nobody writes these, and nobody may wait for them
            recurrent = torch.nn.functional.pad(recurrent, (0, call.row - H))
        tensors = [bits, bits.view(torch.int32), gates, kept, c, status, recurrent.view(torch.int32)]
    call.launch(tensors, entered=h_0 is not None, SAVE=keep_cells)
    m = m.reshape(N, D * H).contiguous()

    y = m
    if call.projected:
        y = new(N, D * P)
        with _products(dtype):
            for d, w in enumerate(weights):
                assert w.weight_hr is not None
                torch.mm(m[:, d * H : (d + 1) * H], w.weight_hr.T, out=y[:, d * P : (d + 1) * P])
        flat.clear(y)  # zero times weights that may be infinite
    h_n = new(D, batch, P)
    for d in range(D):
        h_n[d, : flat.starting] = flat.take(y, d, False)[:, d * P : (d + 1) * P]
        if flat.may_pass:  # rows without a step end where they begin
            flat.passes(h_n[d], None if h_0 is None else flat.sorted(h_0)[d])
    all_cells = None
    if cells:
        assert kept is not None
        all_cells = flat.unflat(flat.clear(kept.permute(1, 0, 2).reshape(N, D * H).clone()))
    saved: tuple[Tensor, ...] = ()
    if save:
        assert kept is not None
        saved = (gates, kept, m) if call.projected else (gates, kept)
    return Forward(flat.unflat(y), flat.unsorted(h_n), flat.unsorted(c).to(dtype), all_cells, saved)


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
    gate_rows: int = 0,
) -> Gradients:
    """See the contract."""
    status = _Status.check(input.device)
    flat = FlatRows(rows, input.device, reset)
    call = _Recurrence(input, weights, flat, backward=True)
    N, D, H, P, batch, dtype = flat.total, call.directions, call.hidden, call.width, flat.batch, call.dtype
    gates, cells, *projected = (each.contiguous() for each in saved)  # a saved-tensors hook may have brought them
    new = input.new_empty

    dy = None if grad_output is None else flat.flat(grad_output)
    dh_n = None if grad_h_n is None else flat.sorted(grad_h_n).contiguous()
    dm, dm_n = dy, dh_n  # of m = o tanh(c): of h where there is no projection
    with _products(dtype):
        if call.projected:
            each = [w.weight_hr for w in weights]
            if dy is not None:
                dm = torch.cat([dy[:, d * P : (d + 1) * P] @ w for d, w in enumerate(each)], 1)  # type: ignore[operator]
            if dh_n is not None:
                dm_n = torch.stack([dh_n[d] @ w for d, w in enumerate(each)])  # type: ignore[operator]
        recurrent = call.recurrent_weights()
    if grad_c_n is None:
        dc = torch.zeros(D, batch, H, dtype=torch.float32, device=input.device)
    else:
        dc = flat.sorted(grad_c_n).to(torch.float32, copy=True).contiguous()
    dcells = None if grad_cells is None else flat.flat(grad_cells)
    c_first = None if c_0 is None else flat.sorted(c_0).contiguous()
    squares = None
    if norms:
        shape = (2, D, call.design.slices, flat.steps, batch)
        squares = torch.zeros(shape, dtype=torch.float64, device=input.device)  # squares of tiny values underflow
    others = [dm, dm_n, dcells, gates, cells, c_first, recurrent]
    if call.design.kind == "resident":
        dz = flat.new(input, D, N, 4 * H)
        tensors = [dz, dc, squares, *others]
    else:
        bits = call.channel(D, N, 4 * H, dim=1)
        dz = bits.view(dtype)
        tensors = [bits, bits.view(torch.int32), dc, squares, status, *others]
    call.launch(
        tensors,
        HAS_DY=dm is not None,
        HAS_DH_N=dm_n is not None,
        HAS_DCELLS=dcells is not None,
        HAS_C_0=c_first is not None,
        NORMS=norms,
    )

    y = flat.flat(output)
    x = flat.flat(input) if needs.weights else None
    dx: Tensor | None = None
    dh_0 = new(D, batch, P) if needs.h_0 else None
    gradients = []
    arrived = []  # what arrives at h_t, where the kernel knows m only
    with _products(dtype):
        for d, w in enumerate(weights):
            dz_d, of_d = dz[d], slice(d * P, (d + 1) * P)
            if needs.input:
                dx = dz_d @ w.weight_ih if dx is None else dx.addmm_(dz_d, w.weight_ih)
            if dh_0 is not None:
                dh_0[d, : flat.starting] = flat.unless_reset(flat.take(dz_d, d, True) @ w.weight_hh, d)
                if flat.may_pass:
                    flat.passes(dh_0[d], None if dh_n is None else dh_n[d])
            dh = None
            if call.projected and (needs.weights or norms):
                dh = flat.from_after(dz_d @ w.weight_hh, None if dh_n is None else dh_n[d, : flat.starting], d)
                if dy is not None:
                    dh += dy[:, of_d]
                arrived.append(dh)
            if x is None:
                gradients.append(WeightGradients())
                continue
            before = flat.states_before(y[:, of_d], None if h_0 is None else flat.entering(h_0, d), d)
            bias = _column_sums(dz_d) if w.bias_ih is not None else None
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
        None if dx is None else flat.unflat(flat.clear(dx)),
        None if dh_0 is None else flat.unsorted(dh_0),
        flat.unsorted(dc).to(dtype) if needs.c_0 else None,
        tuple(gradients),
        None if squares is None else _magnitudes(flat, squares, arrived),
        _gate_statistics(flat, gates, H, gate_rows) if gate_rows else None,
    )


def _column_sums(x: Tensor) -> Tensor:
    """Of (N, M), summed in float32 (of 16 bits as cuBLAS does)."""
    if x.dtype == torch.float32:
        return x.sum(0)
    return (x.new_ones(1, len(x)) @ x).squeeze(0)  # torch's sum takes a workspace of twice the size of ``x``


def _magnitudes(flat: FlatRows, squares: Tensor, arrived: list[Tensor]) -> Tensor:
    """(2, D, T, B) norms from (2, D, slices, T, B) sums of squares; with a projection, those of h from ``arrived``."""
    result = squares.sum(2).sqrt_()
    for d, dh in enumerate(arrived):
        flat.by_step(torch.linalg.vector_norm(dh, dim=1, dtype=torch.float64), result[0, d])
    result = result.float()
    return result if flat.order is None else torch.empty_like(result).index_copy_(-1, flat.order, result)


def _gate_statistics(flat: FlatRows, gates: Tensor, hidden: int, wanted: int) -> GateStatistics:
    rows = torch.tensor(list(sampled_rows(flat.begun(), wanted)), dtype=torch.int64, device=flat.device)
    index, alive = flat.places(rows)
    sample = gates[:, index].float().unflatten(-1, (4, hidden))  # (D, T, R, 4, H)
    return statistics(sample[..., [0, 1, 3], :].movedim(-2, 0), alive)
