"""A module in steps: weights packed once, a state that stays, one step or a few at a time.

L layers, T steps, B batch, I input, H hidden, P projection (H without one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lstmcore import backends, checks, functional, guards, watching
from lstmcore.backends import AUTO, Situation
from lstmcore.kernels.contract import Layer, Weights
from lstmcore.kernels.cpu import process
from lstmcore.module import LSTM, LSTMCell
from lstmcore.watching import Watch

COMPILED = "numba"  # the backend whose arithmetic the compiled steps are
Array = TypeVar("Array", Tensor, np.ndarray)
_KERNEL_TYPES = (Tensor, nn.Parameter)


class Stream:
    """A module that runs step by step, for inference where each step has to wait for the one before.

    It packs the weights once, keeps the state, and computes one step or a chunk of steps a call, without autograd and
    without allocating memory; each layer's product runs at the speed at which a core reads the weights.  Results are
    those of one long run of the module: in float32, bfloat16, float16 and float64 the same bits as
    ``module(x)`` with ``backend="numba"``, however the steps are divided among calls.

    Where Numba's kernels do not run (other devices and dtypes, or Numba's compiler is switched off) each call runs
    :func:`lstmcore.lstm` instead: the same interface and results, at the speed of an ordinary call.

    Args:
        module: an :class:`lstmcore.LSTM` or :class:`lstmcore.LSTMCell`, or one of ``torch.nn``.  Dropout is off,
            whatever the module's mode, and its hooks do not run, but for those of torch that compute weights (pruning,
            ``weight_norm``, ``spectral_norm``).
        batch: B, the number of rows that all calls have; None: unbatched, without that dimension.
        backend: None for the module's own choice; as for :func:`lstmcore.lstm`.

    Attributes:
        module, batch: as given.
        backend: what runs a step: ``"numba"`` for the compiled steps.

    Raises:
        ValueError: a bidirectional module (it needs the future); an unknown backend.
        TypeError: another kind of module, or a ``batch`` that is not an integer.
        RuntimeError: ``batch`` below 1; a named backend that cannot run the module.

    Results are buffers.  Each call overwrites what the one before returned: copy it (``.clone()``, ``.copy()``) to keep
    it.  As tensors they are inference tensors, so autograd refuses to save them instead of using overwritten values.

    A stream is for one thread at a time: calls of several at once compute nonsense, though they harm nothing else.

    Examples:
        >>> stream = lstmcore.Stream(lstmcore.LSTM(64, 128), batch=1)
        >>> stream.step(torch.zeros(1, 64)).shape
        torch.Size([1, 128])
    """

    def __init__(self, module: nn.Module, batch: int | None = None, *, backend: str | None = None) -> None:
        self._sizes = _Sizes.of(module, batch)
        self.module, self.batch = module, batch
        wanted = getattr(module, "backend", AUTO) if backend is None else backend
        backends.check_name(wanted)
        params = watching.weights(module)
        layers = self._sizes.layers(params)
        checks.check_params(params, checks.known_shapes(layers[0], len(layers)), params[0].dtype, params[0].device)
        self.backend = _backend(wanted, layers, params)
        self._engine: Any = (_Compiled if self.backend == COMPILED else _Plain)(self._sizes, layers, wanted)
        self.update()
        self._one, self._chunk = self._engine.slot(None), None

    def step(self, x: Array, *, reset: Any = None) -> Array:
        """One step.

        Args:
            x: (B, I), or (I,) unbatched; a tensor of the module's dtype and device, or an array of NumPy.
            reset: bool, (B,), or a bool unbatched: rows whose state is zeroed before the step; None: none.

        Returns:
            h of the last layer, (B, P) or (P,), of the kind of ``x``: **a buffer that the next step overwrites.**

        Raises:
            ValueError: ``x`` of a wrong rank or dtype.
            RuntimeError: ``x`` of a wrong size or device; the weights changed and :meth:`update` was not called.
            TypeError: neither a tensor nor an array; an array where NumPy lacks the dtype; ``reset`` that is not bool.
        """
        return self._run(self._one, x, reset)

    def chunk(self, x: Array, *, reset: Any = None) -> Array:
        """Several steps in one call.

        Args:
            x: (T, B, I), (B, T, I) when the module is batch_first, (T, I) unbatched.
            reset: bool, like ``x`` without its last dimension, as of :func:`lstmcore.lstm`; None: none.

        Returns:
            h of the last layer at each step, like ``x`` with P features: **a buffer that the next chunk overwrites.**

        Raises:
            RuntimeError: T = 0; and all errors of :meth:`step`.
        """
        slot = self._chunk
        if slot is None or slot.shape != getattr(x, "shape", None):
            slot = self._chunk = self._engine.slot(self._sizes.steps(x))
        return self._run(slot, x, reset)

    def _run(self, slot: Any, x: Any, reset: Any) -> Any:
        watch = self._watch
        for tensor, version, address in watch.marks:
            if tensor._version != version or tensor.data_ptr() != address:
                raise RuntimeError(STALE)
        if [*map(id, watch.owned)] != watch.ids:
            raise RuntimeError(STALE)
        # What can be read in place, or copied by NumPy at once; the rest is checked in full, and copied.
        kind = type(x)
        if kind is np.ndarray and x.shape == slot.shape and x.dtype == slot.array_dtype:
            slot.x_array[...] = x
            address, result = slot.x_address, slot.y_array
        elif kind is Tensor and x.dtype is slot.tensor_dtype and x.shape == slot.shape and slot.in_place(x):
            address, result = x.data_ptr(), slot.y
        else:
            return slot.slow(x, reset)
        slot.run(slot.arguments, address, 0 if reset is None else slot.flags(reset))
        return result

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """A copy of ``(h, c)``, (L, B, P) and (L, B, H), without B unbatched and without L of a cell.

        Setting it takes tensors or arrays of these shapes.  h and c are those of the module's dtype; the
        stream keeps those of 16-bit dtypes in float32, so setting what was read rounds them.

        Raises:
            RuntimeError: a wrong number, shape, dtype or device of states.
            TypeError: states that are neither tensors nor arrays.
        """
        h, c = self._engine.state()
        return self._sizes.of_state(h), self._sizes.of_state(c)

    @state.setter
    def state(self, value: tuple[Any, Any]) -> None:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            got = len(value) if isinstance(value, (tuple, list)) else type(value).__name__
            raise RuntimeError(f"a stream has two states: expected (h, c), got {got}")
        h, c = self._given_state("h", value[0], self._sizes.width), self._given_state("c", value[1], self._sizes.hidden)
        self._engine.set_state(h, c)

    def _given_state(self, name: str, given: Any, width: int) -> Tensor:
        """A state that the caller sets, as (L, B, width)."""
        sizes, like = self._sizes, self._engine
        if not isinstance(given, (Tensor, np.ndarray)):
            raise TypeError(f"Expected {name} to be a tensor or an array of NumPy, got {type(given).__name__}")
        state = _from_numpy(given) if isinstance(given, np.ndarray) else given
        if state is not None and state is not given:
            state = state.to(like.device)
        expected = sizes.state_shape(width)
        if given.shape != expected or state is None or state.dtype != like.dtype or state.device != like.device:
            raise RuntimeError(
                f"Expected {name} of shape {expected}, {like.dtype} and on {like.device}, got "
                f"{tuple(given.shape)}, {given.dtype} and on {given.device if isinstance(given, Tensor) else 'cpu'}"
            )
        _check_plain(state)
        return state.detach().contiguous().view(sizes.num_layers, sizes.rows, -1)

    def reset(self, rows: Any = None) -> None:
        """Zeroes the state of all rows, or of ``rows``: indices, or a bool mask (B,).

        Raises:
            IndexError: an index out of range, or a mask of another size.
            TypeError: neither indices nor bools.
        """
        self._engine.reset(None if rows is None else checks.row_indices(rows, self._sizes.rows))

    def update(self) -> None:
        """Packs the weights again, after they changed; the state stays.

        What a stream can notice by itself are changes that torch counts (an optimizer's step, ``load_state_dict``), the
        steps of optimizers that torch does not count (``fused=True``), and parameters, masks and parametrizations
        that were replaced or moved.  Writes past torch's counters (``weight.data.copy_()``, through NumPy) it does
        not see; call this after them.

        Raises:
            RuntimeError: the parameters' shapes, dtype or device are others than when the stream was made.
        """
        watch = Watch(self.module)
        first, count = self._engine.layers[0], self._sizes.num_layers
        checks.check_params(watch.weights, checks.known_shapes(first, count), first.dtype, first.device)
        guards.in_memory(watch.weights)
        self._engine.pack(watch.weights)
        watch.weights = []
        self._watch = watch

    def __reduce__(self) -> Any:
        raise TypeError("a Stream cannot be copied or pickled: make one of the copied module, and set its state")

    def __repr__(self) -> str:
        return f"Stream({self.module!r}, batch={self.batch}, backend={self.backend!r})"


def prewarm(dtype: torch.dtype, device: torch.device) -> None:
    """Compiles, or loads from the disk cache, what streams of a dtype need; RuntimeError where nothing is compiled."""
    layer = Layer(device, dtype, 1, 1, 1, 1)
    backends.chosen(COMPILED, layer, 1, Situation.now(extended=False))
    from lstmcore.kernels.cpu import stepping

    stepping.prewarm(dtype)


STALE = "the weights changed since the stream packed them: call update(), which packs them again"


def _backend(wanted: str, layers: Sequence[Layer], params: Iterable[Tensor]) -> str:
    """The name of the backend that runs a step; RuntimeError if a named one cannot."""
    opaque = any(type(each) not in _KERNEL_TYPES for each in params)
    situation = Situation.now(extended=False, opaque=opaque)
    if wanted in (AUTO, COMPILED):
        try:
            for layer in layers:
                backends.chosen(COMPILED, layer, 1, situation)
            return COMPILED
        except RuntimeError:
            if wanted == COMPILED:
                raise
    return backends.chosen(wanted, layers[0], len(layers), situation).name


class _Sizes(NamedTuple):
    """The sizes of a stream, and the shapes of its tensors."""

    inputs: int
    hidden: int
    width: int  # P
    num_layers: int
    rows: int  # B, or 1 unbatched
    batched: bool
    cell: bool
    by_row: bool  # chunks are (B, T, ·)
    bias: bool

    @staticmethod
    def of(module: Any, batch: int | None) -> _Sizes:
        cell = isinstance(module, (nn.LSTMCell, LSTMCell))
        if not cell and not isinstance(module, (nn.LSTM, LSTM)):
            raise TypeError(f"Expected an LSTM or an LSTMCell, got {type(module).__name__}")
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int)):
            raise TypeError(f"batch should be an integer or None, got: {batch!r}")
        if batch is not None and batch < 1:
            raise RuntimeError(f"batch should be at least 1, got {batch}")
        if getattr(module, "bidirectional", False):
            raise ValueError("a bidirectional module cannot run step by step: its second direction needs the future")
        width = getattr(module, "proj_size", 0) or module.hidden_size
        batched = batch is not None
        return _Sizes(
            module.input_size, module.hidden_size, width, getattr(module, "num_layers", 1), batch or 1, batched, cell,
            batched and getattr(module, "batch_first", False), module.bias,
        )  # fmt: skip

    def layers(self, params: Sequence[Tensor]) -> list[Layer]:
        """The layers of a step."""
        proj = self.width if self.width != self.hidden else 0
        first = Layer(
            params[0].device, params[0].dtype, 1, self.rows, self.inputs, self.hidden, proj, bias=self.bias
        )  # fmt: skip
        return [first, *[first.after()] * (self.num_layers - 1)]

    def steps(self, x: Any) -> int:
        """T of a chunk; raises ValueError for a wrong rank, RuntimeError for T = 0."""
        rank = 2 + self.batched
        if not isinstance(x, (Tensor, np.ndarray)):
            return 1  # refused where the rest is
        if x.ndim != rank:
            raise ValueError(f"LSTM: Expected a chunk to be {rank}D, got {x.ndim}D instead")
        steps = x.shape[1 if self.by_row else 0]
        checks.some_steps(steps)
        return steps

    def shape(self, steps: int | None) -> tuple[int, ...]:
        """The shape of a call's input without its features; ``steps``: None of a single step."""
        if not self.batched:
            return () if steps is None else (steps,)
        if steps is None:
            return (self.rows,)
        return (self.rows, steps) if self.by_row else (steps, self.rows)

    def state_shape(self, width: int) -> tuple[int, ...]:
        return (*(() if self.cell else (self.num_layers,)), *((self.rows,) if self.batched else ()), width)

    def of_state(self, state: Tensor) -> Tensor:
        """A state (L, B, ·) in the caller's form."""
        return state.view(self.state_shape(state.shape[-1]))


def _from_numpy(array: np.ndarray) -> Tensor | None:
    """An array of any strides as a tensor that nobody writes to; None if torch has no such dtype."""
    if not array.dtype.isnative or array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        return None
    whole = np.ascontiguousarray(array)
    return torch.from_numpy(whole if whole.flags.writeable else whole.copy()).view(array.shape)


def _check_dense(tensor: Tensor) -> None:
    if tensor.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            f"a stream takes plain dense tensors, got one of layout {tensor.layout}, or of a transform of torch.func: "
            "convert it with to_dense(), or call the module"
        )


def _check_plain(tensor: Tensor) -> None:
    """Raises TypeError or RuntimeError unless the values of ``tensor`` are in memory."""
    _check_dense(tensor)
    guards.in_memory((tensor,))


class _Slot:
    """What the calls of one shape have in common: shapes, dtypes and checks."""

    tensor_dtype: torch.dtype | None = None  # of tensors that are read in place
    array_dtype: object = object()  # of arrays that are copied at once (None would be equal to float64)

    def __init__(self, sizes: _Sizes, steps: int | None, dtype: torch.dtype, device: torch.device) -> None:
        self.before = sizes.shape(steps)  # of the input, without its features
        self.shape = (*self.before, sizes.inputs)
        self.dtype, self.device = dtype, device

    def check(self, x: Any) -> Tensor:
        """``x`` as a tensor; raises the errors of :meth:`Stream.step`."""
        if isinstance(x, np.ndarray):
            if self.dtype == torch.bfloat16:
                raise TypeError("NumPy has no bfloat16: pass a tensor")
            given, x = x, _from_numpy(x)
            if x is None:
                raise ValueError(f"RNN input dtype ({given.dtype}) does not match weight dtype ({self.dtype})")
            x = x if x.dtype != self.dtype else x.to(self.device)
        if not isinstance(x, Tensor):
            raise TypeError(f"Expected a tensor or an array of NumPy, got {type(x).__name__}")
        _check_dense(x)
        if x.dim() != len(self.shape):
            raise ValueError(f"LSTM: Expected input to be {len(self.shape)}D, got {x.dim()}D instead")
        if x.dtype != self.dtype:
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({self.dtype}). "
                f"Convert input: input.to({self.dtype}), or convert model: model.to({x.dtype})"
            )
        checks.features(x, self.shape[-1])
        if x.shape != self.shape:
            raise RuntimeError(f"Expected input size {self.shape}, got {tuple(x.shape)}")
        if x.device != self.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, "
                f"found input tensor at {x.device} and parameter tensor at {self.device}"
            )
        guards.in_memory((x,))
        return x.detach()

    def check_reset(self, reset: Any) -> Tensor:
        """``reset`` as a tensor."""
        if isinstance(reset, (bool, np.bool_, np.ndarray)):
            reset = torch.from_numpy(np.array(reset)).to(self.device)
        checks.check_reset(reset, self.before, self.device)
        _check_plain(reset)
        return reset


class _CompiledSlot(_Slot):
    """Calls of one shape by the compiled kernel, and their buffers in the caller's shape."""

    def __init__(self, sizes: _Sizes, steps: int | None, stepper: Any) -> None:
        from lstmcore.kernels.cpu.stepping import Form, Shape

        super().__init__(sizes, steps, stepper.dtype, stepper.layers[0].device)
        self.form = form = Form(stepper, Shape(steps or 1, sizes.by_row and steps is not None))
        self.tensor_dtype, self.itemsize = stepper.dtype, stepper.dtype.itemsize
        self.x, self.mask = form.x.view(self.shape), form.reset.view(self.before)
        self.bytes = self.x.numel() * self.itemsize
        with torch.inference_mode():  # autograd refuses to save it
            self.y = form.y().view(*self.before, sizes.width)
        if stepper.dtype != torch.bfloat16:
            self.x_array, self.y_array = self.x.numpy(), form.y().view(self.y.shape).numpy()
            self.array_dtype = self.x_array.dtype
        self.x_address, self.arguments = form.x_address, form.address
        self.y_begin = self.y.data_ptr()
        self.y_end = self.y_begin + self.y.nbytes
        self.run = form.run_alone if form.threads == 1 else form.run

    def in_place(self, x: Tensor) -> bool:
        """Whether the kernel can read ``x`` where it is."""
        if not x.is_cpu or x.layout is not torch.strided or not x.is_contiguous() or x.is_neg():
            return False
        try:
            stored, address = x.untyped_storage().nbytes(), x.data_ptr()
        except NotImplementedError:  # a wrapper, such as those of torch.func
            return False
        if stored < x.storage_offset() * self.itemsize + self.bytes or not address:  # freed, or a symbolic zero
            return False
        return not self.y_begin <= address < self.y_end  # fed back: it would be overwritten while it is read

    def flags(self, reset: Any) -> int:
        """The address of the mask."""
        self.mask.copy_(self.check_reset(reset))
        return self.form.reset_address

    @process.one_torch_thread
    def slow(self, x: Any, reset: Any) -> Any:
        """Checks and copies what cannot be read in place, and computes."""
        self.x.copy_(self.check(x))
        self.run(self.arguments, self.x_address, 0 if reset is None else self.flags(reset))
        return self.y if isinstance(x, Tensor) else self.y_array


class _Compiled:
    """A stream by the compiled kernel."""

    def __init__(self, sizes: _Sizes, layers: list[Layer], wanted: str) -> None:
        from lstmcore.kernels.cpu.stepping import Stepper

        with torch.inference_mode(False):
            self._stepper = Stepper(layers)
        self._sizes, self.layers, self.dtype, self.device = sizes, layers, layers[0].dtype, layers[0].device

    def slot(self, steps: int | None) -> _CompiledSlot:
        with torch.inference_mode(False):
            return _CompiledSlot(self._sizes, steps, self._stepper)

    def pack(self, params: Sequence[Tensor]) -> None:
        each = len(params) // len(self.layers)
        of_layer = (params[at : at + each] for at in range(0, len(params), each))
        self._stepper.pack([Weights.by_direction(own, 1)[0] for own in of_layer])

    @process.one_torch_thread
    def state(self) -> tuple[Tensor, Tensor]:
        h, c = (state.to(self.dtype, copy=True) for state in (self._stepper.h, self._stepper.c))
        return h.contiguous(), c.contiguous()

    @process.one_torch_thread
    def set_state(self, h: Tensor, c: Tensor) -> None:
        self._stepper.h.copy_(h)
        self._stepper.c.copy_(c)

    @process.one_torch_thread
    def reset(self, rows: Tensor | None) -> None:
        for state in (self._stepper.h, self._stepper.c):
            if rows is None:
                state.zero_()
            else:
                state[:, rows] = 0


class _PlainSlot(_Slot):
    """Calls of one shape by :func:`lstmcore.lstm`."""

    def __init__(self, engine: _Plain, steps: int | None) -> None:
        super().__init__(engine.sizes, steps, engine.dtype, engine.device)
        self._engine, self._one = engine, steps is None

    def slow(self, x: Any, reset: Any) -> Any:
        given, sizes, engine = self.check(x), self._engine.sizes, self._engine
        mask = None if reset is None else self.check_reset(reset)
        time = 0 if self._one or not sizes.by_row else 1
        # (T, B, I), the mask (T, B)
        if self._one:
            given, mask = given[None], None if mask is None else mask[None]
        given = given if sizes.batched else given[:, None]
        if mask is not None and not sizes.batched:
            mask = mask[:, None]
        if time:
            given, mask = given.transpose(0, 1), None if mask is None else mask.T
        output = engine.run(given, mask)
        output = output.transpose(0, 1) if time else output
        output = output.reshape(*self.before, sizes.width)
        return output if isinstance(x, Tensor) else output.cpu().numpy()


class _Plain:
    """A stream by ordinary calls."""

    def __init__(self, sizes: _Sizes, layers: list[Layer], wanted: str) -> None:
        self.sizes, self.layers, self._backend = sizes, layers, wanted
        self.dtype, self.device = layers[0].dtype, layers[0].device
        self._states: tuple[Tensor, Tensor]
        self.reset(None)

    def slot(self, steps: int | None) -> _PlainSlot:
        return _PlainSlot(self, steps)

    def pack(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)

    @torch.inference_mode()
    def run(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(T, B, P)"""
        with torch.autocast(self.device.type, enabled=False):
            output, *states = functional.lstm(
                x, self._states, self._params, self.sizes.bias, self.sizes.num_layers, reset=mask, backend=self._backend
            )
        self._states = states[0], states[1]
        return output

    def state(self) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):
            return self._states[0].clone(), self._states[1].clone()

    def set_state(self, h: Tensor, c: Tensor) -> None:
        self._states = h.clone(), c.clone()

    @torch.inference_mode()
    def reset(self, rows: Tensor | None) -> None:
        if rows is None:
            like: Any = {"dtype": self.dtype, "device": self.device}
            stack = self.sizes.num_layers, self.sizes.rows
            self._states = torch.zeros(*stack, self.sizes.width, **like), torch.zeros(*stack, self.sizes.hidden, **like)
        else:
            keep = [each.clone() for each in self._states]
            for each in keep:
                each[:, rows.to(self.device)] = 0
            self._states = keep[0], keep[1]
