"""One layer as ``torch.library`` operators, for everything that traces or transforms a call instead of running it.

``torch.ops.lstmcore.layer`` and ``layer_backward`` are one node each in a graph of ``torch.compile`` or
``torch.export``: opaque to the compiler, with fake kernels whose shapes do not depend on values, so that steps and
batch stay symbolic.  ``torch.func`` transforms go through the same two (``transforms.py``, which also gives them their
derivatives).  An ordinary call does not use them: ``autograd.py`` has the same layer as a plain autograd
Function, which costs less.

The schema's ``kept`` has the cells if they were requested, then what forward saves for backward; without ``save``
(inference, exported graphs, transforms) nothing is saved, and backward computes forward again.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one), D directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstmcore import backends, checks, guards
from lstmcore.backends import REFERENCE
from lstmcore.guards import Kept
from lstmcore.kernels.contract import Call, GradOutputs, Layer, Needs, Rows, Weights, state_dtype

_previous: Any = vars(torch.ops.lstmcore).get("library")
if _previous is not None:  # lstmcore is imported again, as notebooks do: drop what the first import registered
    _previous._destroy()
LIBRARY = torch.library.Library("lstmcore", "DEF")
vars(torch.ops.lstmcore)["library"] = LIBRARY
_INPUTS = (
    "Tensor input, Tensor? h_0, Tensor? c_0, Tensor? reset, Tensor? batch_sizes, Tensor? lengths, Tensor[] weights, "
    "SymInt batch, int directions, bool batch_first, bool cells, bool save, str backend, int segment=0"
)
LIBRARY.define(f"layer({_INPUTS}) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor[] kept)")
LIBRARY.define(
    "layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, "
    f"bool[4] needs, Tensor[] kept, {_INPUTS}) -> Tensor[]"
)


class Arguments(NamedTuple):
    """The arguments of ``layer``, in the order of the schema."""

    input: Tensor  # (T, B, I), or (N, I) with batch_sizes
    h_0: Tensor | None  # (D, B, P)
    c_0: Tensor | None  # (D, B, H)
    reset: Tensor | None  # (T, B) or (N,), bool
    batch_sizes: Tensor | None  # (T,) int64 on the CPU, of packed rows
    lengths: Tensor | None  # (B,), any integers, of padded rows
    weights: Sequence[Tensor]  # as Weights.by_direction takes them
    batch: int  # B; symbolic where it is dynamic
    directions: int
    batch_first: bool
    cells: bool
    save: bool
    backend: str  # "auto": as for long sequences, for every T and B
    segment: int = 0  # of Layer

    @property
    def packed(self) -> bool:
        return self.batch_sizes is not None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The inputs before the weights, then these one by one."""
        return (self.input, self.h_0, self.c_0, self.reset, self.batch_sizes, self.lengths, *self.weights)

    def with_tensors(self, tensors: Sequence[Any]) -> Arguments:
        """The same with other :attr:`tensors`."""
        inputs, weights = tensors[:BEFORE_WEIGHTS], list(tensors[BEFORE_WEIGHTS:])
        return Arguments._make([*inputs, weights, *self[BEFORE_WEIGHTS + 1 :]])

    def without_tensors(self) -> Arguments:
        """The arguments without tensors, for contexts that store tensors separately."""
        return self.with_tensors([None] * BEFORE_WEIGHTS)

    def rows(self) -> Rows:
        """The rows, from the values of batch sizes or lengths."""
        if self.batch_sizes is not None:
            data, sizes = checks.packed(self.input, self.batch_sizes, None)
            if (len(data), sizes[0]) != (len(self.input), self.batch):
                got = f"got {sizes.tolist()}"
                raise RuntimeError(f"Expected {len(self.input)} rows of {self.batch} sequences, {got}")
            return Rows.from_packed(torch.from_numpy(sizes))
        steps, batch, _ = self.input.shape
        if self.lengths is None:
            return Rows(steps, batch, batch_first=self.batch_first)
        if self.lengths.device.type == "cpu":
            return Rows.from_lengths(self.lengths, steps, self.batch_first, roomy=True)
        return Rows(steps, batch, batch_first=self.batch_first, lengths=self.lengths, roomy=True)

    def call(self, rows: Rows) -> Call:
        """The call of a backend; RuntimeError for a wrong number of weights."""
        weights = guards.weights(self.weights, self.directions)
        return Call.of(self.input, self.h_0, self.c_0, weights, rows, self.reset, self.save, self.segment)

    @property
    def extended(self) -> bool:
        return self.reset is not None or self.lengths is not None or self.cells or self.segment > 0


BEFORE_WEIGHTS = Arguments._fields.index("weights")
GRADS = len(GradOutputs._fields)
NEEDS = 4  # of the fields of Needs: what a recording wants is not asked of an operator


class BackwardArguments(NamedTuple):
    """The arguments of ``layer_backward``."""

    grads: GradOutputs
    needs: Needs
    kept: Sequence[Tensor]  # output and what forward saved; if empty, backward computes forward again
    of_layer: Arguments

    @staticmethod
    def unpack(args: Sequence[Any]) -> BackwardArguments:
        """From the order of the schema."""
        return BackwardArguments(
            GradOutputs(*args[:GRADS]), Needs(*args[GRADS]), args[GRADS + 1], Arguments(*args[GRADS + 2 :])
        )

    def pack(self) -> tuple[Any, ...]:
        """In the order of the schema."""
        return (*self.grads, list(self.needs[:NEEDS]), list(self.kept), *self.of_layer)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The gradients, the tensors of the layer, then what is kept."""
        return (*self.grads, *self.of_layer.tensors, *self.kept)

    def with_tensors(self, tensors: Sequence[Any], weights: int) -> BackwardArguments:
        """The same with other :attr:`tensors`, of which ``weights`` are weights."""
        end = GRADS + BEFORE_WEIGHTS + weights
        of_layer = self.of_layer.with_tensors(tensors[GRADS:end])
        return BackwardArguments(GradOutputs(*tensors[:GRADS]), self.needs, list(tensors[end:]), of_layer)

    def without_tensors(self) -> BackwardArguments:
        """The arguments without tensors, for contexts that store tensors separately."""
        return self._replace(grads=GradOutputs(None, None, None), kept=(), of_layer=self.of_layer.without_tensors())


# The operators


def _name(given: Arguments, layer: Layer) -> str:
    """The backend of this call in a graph: it does not depend on the values of lengths."""
    ragged = given.packed or given.lengths is not None
    return backends.in_graph(given.backend, layer._replace(ragged=ragged), given.extended)


def _backend(given: Arguments, layer: Layer) -> Any:
    return backends.load(_name(given, layer))


def _kernels(given: Arguments, call: Call, back: bool = False) -> Any:
    """The backend that runs the call: the reference if there is nothing to compute, or no kernel for it."""
    name = _name(given, call.layer)
    sized = call.rows.total and call.layer.input_size and call.layer.hidden_size
    layer = call.layer._replace(training=given.save or back)  # without save, forward does not know what is to come
    runs = sized and backends.runs_in_graph(given.backend, name, layer, given.extended)
    return backends.load(name if runs else REFERENCE)


def _with_layout(tensor: Tensor, rows: Rows) -> Tensor:
    """``tensor`` with the strides that the fake kernels give it."""
    if rows.packed or not rows.batch_first:
        return tensor.contiguous()
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def _unsaved(given: Arguments, layer: Layer, room: Any) -> list[Tensor]:
    """New tensors of the sizes that forward saves."""
    sizes = _backend(given, layer).saves(layer, room)
    return [given.input.new_empty(size, dtype=dtype) for size, dtype in sizes]


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    given = Arguments(*args)
    rows = given.rows()
    checks.some_steps(rows.steps)
    call = given.call(rows)
    guards.layer(call)
    kernels = _kernels(given, call)
    result = kernels.forward(call, save=given.save, cells=given.cells)
    kept = [] if result.cells is None else [_with_layout(result.cells, rows)]
    if given.save:  # the reference saves what it likes where it stands in for another backend
        own = kernels is _backend(given, call.layer) and result.saved
        kept += own or _unsaved(given, call.layer, rows.room)
    return _with_layout(result.output, rows), result.h_n.contiguous(), result.c_n.contiguous(), kept


@contextmanager
def _autograd_inside() -> Iterator[None]:
    """Lets an operator's own code use autograd, which an enclosing dispatch mode has switched off."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
        yield


def _backward(*args: Any) -> list[Tensor]:
    grads, needs, kept, given = BackwardArguments.unpack(args)
    rows = given.rows()
    call = given.call(rows)
    output, *saved = kept or [None]  # type: ignore[list-item]
    sizes = []
    if kept:  # with room for padding; without, if the eager Function has run forward
        saves = _backend(given, call.layer).saves
        exact = [tuple(each.shape) for each in saved] == [size for size, _ in saves(call.layer, rows.total)]
        sizes = saves(call.layer, rows.total if exact else rows.room)
    guards.layer(call, Kept(output, grads, saved, sizes))
    kernels = _kernels(given, call, back=True)
    if kernels is not _backend(given, call.layer):
        kept, saved = (), []  # in place of what it would have saved: see _forward
    if not kept and kernels.saves(call.layer, 0):
        done = kernels.forward(call, save=True, cells=False)
        output, saved = done.output, done.saved
    with _autograd_inside(), torch.no_grad():
        found = kernels.backward(call, grads, output, tuple(saved), needs)
    result = [] if found.input is None else [_with_layout(found.input, rows)]
    memory = set()
    for grad in (found.h_0, found.c_0, *found.of(call.weights)):
        if grad is not None:
            grad = grad.contiguous()
            at = grad.untyped_storage().data_ptr()
            result.append(grad.clone() if at in memory else grad)  # operators may not return one twice
            memory.add(at)
    return result


# The fake kernels: shapes, independently of values


def _like_rows(given: Arguments, width: Any, dtype: torch.dtype) -> Tensor:
    """A new tensor of the rows of ``input``: (N, width) or (T, B, width), in the layout of ``Rows.new``."""
    if given.packed:
        return given.input.new_empty((given.input.shape[0], width), dtype=dtype)
    steps, batch, _ = given.input.shape
    if given.batch_first:
        return given.input.new_empty((batch, steps, width), dtype=dtype).transpose(0, 1)
    return given.input.new_empty((steps, batch, width), dtype=dtype)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    given = Arguments(*args)
    input, weights = given.input, Weights.by_direction(given.weights, given.directions)
    steps = input.shape[0] if given.batch_sizes is None else given.batch_sizes.shape[0]
    layer = Layer.of(input, weights, steps, given.batch, training=given.save, segment=given.segment)
    kept = []
    if given.cells:
        kept.append(_like_rows(given, layer.directions * layer.hidden_size, state_dtype(input.dtype)))
    if given.save:
        kept += _unsaved(given, layer, input.shape[0] if given.packed else input.shape[0] * input.shape[1])
    output = _like_rows(given, layer.directions * layer.width, input.dtype)
    return output, input.new_empty(layer.h_shape), input.new_empty(layer.c_shape), kept


def _fake_backward(*args: Any) -> list[Tensor]:
    _, needs, _, given = BackwardArguments.unpack(args)
    result = []
    if needs.input:
        result.append(_like_rows(given, given.input.shape[-1], given.input.dtype))
    states = (given.h_0, needs.h_0), (given.c_0, needs.c_0)
    for tensor, wanted in (*states, *((weight, needs.weights) for weight in given.weights)):
        if wanted:
            assert tensor is not None
            result.append(tensor.new_empty(tensor.shape))
    return result


LIBRARY.impl("layer", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("layer_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("lstmcore::layer", _fake_forward, lib=LIBRARY)
torch.library.register_fake("lstmcore::layer_backward", _fake_backward, lib=LIBRARY)
