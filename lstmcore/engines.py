"""What computes the steps of a stream: the compiled kernel, or ordinary calls; the shapes and checks of both.

L layers, T steps, B batch, I input, H hidden, P projection (H without one).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lstmcore import checks, functional, guards, stock
from lstmcore.kernels.contract import Layer, Weights
from lstmcore.kernels.cpu import process
from lstmcore.module import LSTM, LSTMCell


class Sizes(NamedTuple):
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
    def of(module: Any, batch: int | None) -> Sizes:
        cell = isinstance(module, (stock.LSTMCell, LSTMCell))
        if not cell and not isinstance(module, (stock.LSTM, LSTM)):
            raise TypeError(f"Expected an LSTM or an LSTMCell, got {type(module).__name__}")
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, Integral)):
            raise TypeError(f"batch should be an integer or None, got: {batch!r}")
        if batch is not None and batch < 1:
            raise RuntimeError(f"batch should be at least 1, got {batch}")
        if getattr(module, "bidirectional", False):
            raise ValueError("a bidirectional module cannot run step by step: its second direction needs the future")
        width = getattr(module, "proj_size", 0) or module.hidden_size
        batched = batch is not None
        return Sizes(
            module.input_size, module.hidden_size, width, getattr(module, "num_layers", 1), int(batch or 1), batched,
            cell, batched and getattr(module, "batch_first", False), module.bias,
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


def from_numpy(array: np.ndarray) -> Tensor | None:
    """An array of any strides as a tensor that nobody writes to; None if torch has no such dtype."""
    if not array.dtype.isnative or array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        return None
    whole = np.ascontiguousarray(array)
    return torch.from_numpy(whole if whole.flags.writeable else whole.copy()).view(array.shape)


def check_dense(tensor: Tensor) -> None:
    if tensor.layout != torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(
            f"a stream takes plain dense tensors, got one of layout {tensor.layout}, or of a transform of torch.func: "
            "convert it with to_dense(), or call the module"
        )


def check_plain(tensor: Tensor) -> None:
    """Raises TypeError or RuntimeError unless the values of ``tensor`` are in memory."""
    check_dense(tensor)
    guards.in_memory((tensor,))


class Slot:
    """What the calls of one shape have in common: shapes, dtypes and checks."""

    tensor_dtype: torch.dtype | None = None  # of tensors that are read in place
    array_dtype: object = object()  # of arrays that are copied at once (None would be equal to float64)

    def __init__(self, sizes: Sizes, steps: int | None, dtype: torch.dtype, device: torch.device) -> None:
        self.before = sizes.shape(steps)  # of the input, without its features
        self.shape = (*self.before, sizes.inputs)
        self.dtype, self.device = dtype, device

    def check(self, x: Any) -> Tensor:
        """``x`` as a tensor; raises the errors of :meth:`Stream.step`."""
        if isinstance(x, np.ndarray):
            if self.dtype == torch.bfloat16:
                raise TypeError("NumPy has no bfloat16: pass a tensor")
            given, x = x, from_numpy(x)
            if x is None:
                raise ValueError(f"RNN input dtype ({given.dtype}) does not match weight dtype ({self.dtype})")
            x = x if x.dtype != self.dtype else x.to(self.device)
        if not isinstance(x, Tensor):
            raise TypeError(f"Expected a tensor or an array of NumPy, got {type(x).__name__}")
        check_dense(x)
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
        check_plain(reset)
        return reset


class CompiledSlot(Slot):
    """Calls of one shape by the compiled kernel, and their buffers in the caller's shape."""

    def __init__(self, sizes: Sizes, steps: int | None, stepper: Any) -> None:
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


class Compiled:
    """A stream by the compiled kernel."""

    def __init__(self, sizes: Sizes, layers: list[Layer], wanted: str) -> None:
        from lstmcore.kernels.cpu.stepping import Stepper

        with torch.inference_mode(False):
            self._stepper = Stepper(layers)
        self._sizes, self.layers, self.dtype, self.device = sizes, layers, layers[0].dtype, layers[0].device

    def slot(self, steps: int | None) -> CompiledSlot:
        with torch.inference_mode(False):
            return CompiledSlot(self._sizes, steps, self._stepper)

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


class PlainSlot(Slot):
    """Calls of one shape by :func:`lstmcore.lstm`."""

    def __init__(self, engine: Plain, steps: int | None) -> None:
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


class Plain:
    """A stream by ordinary calls."""

    def __init__(self, sizes: Sizes, layers: list[Layer], wanted: str) -> None:
        self.sizes, self.layers, self._backend = sizes, layers, wanted
        self.dtype, self.device = layers[0].dtype, layers[0].device
        self._states: tuple[Tensor, Tensor]
        self.reset(None)

    def slot(self, steps: int | None) -> PlainSlot:
        return PlainSlot(self, steps)

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
