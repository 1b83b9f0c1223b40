"""A module in steps: weights packed once, a state that stays, one step or a few at a time.

L layers, T steps, B batch, I input, H hidden, P projection (H without one).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lstmcore import backends, checks, guards, watching
from lstmcore.backends import AUTO, Situation
from lstmcore.engines import Compiled, Plain, Sizes, check_plain, from_numpy
from lstmcore.kernels.contract import Layer
from lstmcore.watching import Watch

COMPILED = "numba"  # the backend whose arithmetic the compiled steps are
Array = TypeVar("Array", Tensor, np.ndarray)
_KERNEL_TYPES = (Tensor, nn.Parameter)


class Stream:
    """A module that runs step by step, for inference where each step has to wait for the one before.

    It packs the weights once, keeps the state, and computes one step or a chunk of steps a call, without autograd and
    without allocating memory; with one row, a layer's product runs at the speed at which a core reads the weights.
    Results are those of one long run of the module: in float32, bfloat16, float16 and float64 the same bits as
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
        self._sizes = Sizes.of(module, batch)
        self.module, self.batch = module, None if batch is None else int(batch)
        wanted = getattr(module, "backend", AUTO) if backend is None else backend
        backends.check_name(wanted)
        params = watching.weights(module)
        layers = self._sizes.layers(params)
        checks.check_params(params, checks.known_shapes(layers[0], len(layers)), params[0].dtype, params[0].device)
        self.backend = _backend(wanted, layers, params)
        self._engine: Any = (Compiled if self.backend == COMPILED else Plain)(self._sizes, layers, wanted)
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
        state = from_numpy(given) if isinstance(given, np.ndarray) else given
        if state is not None and state is not given:
            state = state.to(like.device)
        expected = sizes.state_shape(width)
        if given.shape != expected or state is None or state.dtype != like.dtype or state.device != like.device:
            raise RuntimeError(
                f"Expected {name} of shape {expected}, {like.dtype} and on {like.device}, got "
                f"{tuple(given.shape)}, {given.dtype} and on {given.device if isinstance(given, Tensor) else 'cpu'}"
            )
        check_plain(state)
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
    backends.chosen(COMPILED, layer, 1, Situation.now(layer, extended=False))
    from lstmcore.kernels.cpu import stepping

    stepping.prewarm(dtype)


STALE = "the weights changed since the stream packed them: call update(), which packs them again"


def _backend(wanted: str, layers: Sequence[Layer], params: Iterable[Tensor]) -> str:
    """The name of the backend that runs a step; RuntimeError if a named one cannot."""
    opaque = any(type(each) not in _KERNEL_TYPES for each in params)
    situation = Situation.now(layers[0], extended=False, opaque=opaque)
    if wanted in (AUTO, COMPILED):
        try:
            for layer in layers:
                backends.chosen(COMPILED, layer, 1, situation)
            return COMPILED
        except RuntimeError:
            if wanted == COMPILED:
                raise
    return backends.chosen(wanted, layers[0], len(layers), situation).name
