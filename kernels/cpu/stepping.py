"""Host code of a stream: memory that stays between calls, weights packed once, and a launch prepared for each shape.

L layers, T steps of a call, B batch, I input, H hidden, P projection (or H).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..contract import GATES, Layer, Weights
from ..integers import ceil_div
from . import buffers, process, threads, tiling
from .jobs import PACK_BIAS, PACK_COLUMNS, PACK_GATES, Job, JobsArgs, column_panels_size
from .prepared import LINE
from .problem import PARTITION, Table, kernels_of, multiples, partition
from .products import TILE_ROWS
from .streaming import StreamArgs, StreamLayer, shared_stream_kernel, stream_kernel

BAND = 32  # steps that one layer takes before the next one does, while its weights are in a close cache
X, RESET = map(StreamArgs._fields.index, ("x", "reset"))
assert StreamArgs._fields[-len(PARTITION) - 1 :] == (*PARTITION, "counter")


def prewarm(dtype: torch.dtype) -> None:
    """Compiles, or loads from the disk cache, what a stream of this dtype needs."""
    kernels = kernels_of(dtype)
    kernels.jobs()
    stream_kernel(kernels.variant)
    shared_stream_kernel(kernels.variant)
    threads.prewarm()


class Memory:
    """Aligned pieces of one allocation, uninitialised.  An array or tensor of a piece keeps all of it in use."""

    def __init__(self, **sizes: int) -> None:
        self._places, total = {}, 0
        for name, size in sizes.items():
            self._places[name] = total, size
            total += ceil_div(size, buffers.ALIGN) * buffers.ALIGN
        owner, base = buffers.scratch(total)
        self._all: np.ndarray = owner  # type: ignore[assignment]
        self.at = {name: base + place if size else 0 for name, (place, size) in self._places.items()}

    def clear(self) -> None:
        """Zeroes all pieces."""
        self._all[:] = 0

    def array(self, name: str, dtype: str, *shape: int) -> np.ndarray:
        """A piece as an array."""
        place, size = self._places[name]
        # An array's slice refers to what the array itself is a slice of; a memoryview's to the array, which is what was
        # lent: without a reference to it, it would be lent again.
        whole: Any = self._all
        return np.asarray(memoryview(whole)[place : place + size]).view(dtype).reshape(shape)

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A piece as a tensor."""
        return torch.from_numpy(self.array(name, "uint8", -1)).view(dtype).view(shape)


class Shape(NamedTuple):
    """The layout of a call's input and output, which are contiguous: T steps, and whether rows come first."""

    steps: int
    by_row: bool = False  # (B, T, ·) instead of (T, B, ·)

    def sizes(self, batch: int) -> tuple[int, int]:
        return (batch, self.steps) if self.by_row else (self.steps, batch)

    def strides(self, batch: int, width: int) -> tuple[int, int]:
        """(of a step, of a row)."""
        return (width, self.steps * width) if self.by_row else (batch * width, width)


class Form:
    """What a stream's calls of one shape have in common: the prepared launch, and buffers.

    ``x`` and ``reset`` are the buffers as tensors.  The kernel reads its input where it is told to; ``x`` is for inputs
    that cannot be read in place.
    """

    def __init__(self, stepper: Stepper, shape: Shape) -> None:
        self._stepper, layer, batch, size = stepper, stepper.layers[0], stepper.batch, stepper.dtype.itemsize
        sizes, tokens = shape.sizes(batch), shape.steps * batch
        self._memory = memory = Memory(
            x=tokens * layer.input_size * size, y=tokens * layer.width * size, reset=tokens,
            arguments=8 * len(StreamArgs._fields),
        )  # fmt: skip
        self.x = memory.tensor("x", stepper.dtype, *sizes, layer.input_size)
        self._y = stepper.dtype, *sizes, layer.width
        self.reset = memory.tensor("reset", torch.bool, *sizes)
        self.x_address, self.reset_address, self.address = (memory.at[name] for name in ("x", "reset", "arguments"))
        self._fields, self._tables = {"steps": shape.steps, "y": memory.at["y"]}, list[Table]()
        for name, width, each in (("x", layer.input_size, size), ("y", layer.width, size), ("reset", 1, 1)):
            step, row = (stride * each for stride in shape.strides(batch, width))
            self._tables.append(multiples(batch, row))
            self._fields |= {f"{name}_step": step, f"{name}_rows": self._tables[-1].address}
        memory.array("arguments", "int64", -1)[:] = stepper.arguments(self._fields, 1)[0]
        work = sum(each.gates * (each.input_size + each.width) for each in stepper.layers)
        worth = min(stepper.most_members, tiling.threads_worth(tokens * work))
        self.threads = 1 if worth == 1 else len(stepper.arguments(self._fields, worth))
        # (address, x, reset): the steps of the input at address ``x``, ``reset`` 0 for none, on the calling thread
        self.run_alone = stepper.entry
        self._idle: dict[int, list[_Shared]] = {}

    def y(self) -> Tensor:
        """The buffer of the output as a new tensor: an inference tensor if made in inference mode."""
        return self._memory.tensor("y", *self._y)

    def run(self, address: int, x: int, reset: int) -> None:
        """As ``run_alone``, on the threads that are available."""
        members = threads.available(self.threads)
        if members == 1:
            self.run_alone(address, x, reset)
            return
        idle = self._idle.setdefault(members, [])
        try:
            shared = idle.pop()  # each has a barrier of its own: several threads of the user's may be here at once
        except IndexError:
            kernel = shared_stream_kernel(self._stepper.variant)
            shared = _Shared(kernel, self._stepper.arguments(self._fields, members))
        shared.run(x, reset)
        idle.append(shared)


class _Shared:
    """A launch on several threads, which one call at a time may use."""

    def __init__(self, kernel: Any, structs: np.ndarray) -> None:
        self._structs, counters = structs, np.zeros(3 * LINE, np.int64)
        self._counter = counters[LINE : LINE + 1]
        structs[:, -1] = buffers.address_of(self._counter)
        launch = threads.Launch(buffers.address_of(structs), len(structs), 8 * structs.shape[1])
        self._several = threads.Repeated(kernel, launch, self._counter)

    def run(self, x: int, reset: int) -> None:
        self._structs[:, X], self._structs[:, RESET], self._counter[0] = x, reset, 0
        self._several.run()


class Stepper:
    """A stack of layers in one direction with its packed weights and its state; it checks nothing."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers, first, kernels = tuple(layers), layers[0], kernels_of(layers[0].dtype)
        self.dtype, self.compute, self.variant, self.batch = first.dtype, kernels.compute, kernels.variant, first.batch
        self.entry = _entry_point(stream_kernel(kernels.variant))
        self.most_members = threads.count()
        self._block, self._size = kernels.block, kernels.size
        self._terms, self.operand = kernels.products.terms, kernels.operand
        padded, padded_width = self._block.padded(first.hidden_size), self._block.padded(first.width)
        self._panels, count, gates = padded // self._block.lanes, len(layers), GATES * padded * self._size
        columns = column_panels_size(self._terms(first.hidden_size), first.width, self._block.lanes) * self._size
        x_row, h_row, m_row = map(
            kernels.variant.operand_row, (max(layer.input_size for layer in layers), first.width, first.hidden_size)
        )
        beyond = TILE_ROWS * kernels.products.tiled  # rows that a block may read beyond its own
        self._between = BAND * self.batch * first.width * first.dtype.itemsize
        self._stage = self.batch * x_row * kernels.staged
        self._half, self._o = self.batch * h_row, self._block.rows * self._block.lanes * self._size
        strides = {
            "between_rows": first.width * first.dtype.itemsize, "m_rows": m_row, "stage_rows": x_row, "h_rows": h_row,
            "sums_rows": padded_width * self._size,
        }  # fmt: skip
        self._tables = {name: multiples(self.batch, stride) for name, stride in strides.items()}
        pieces = {
            f"{name}{index}": size
            for index, layer in enumerate(layers)
            for name, size in (
                ("w", gates * (self._terms(layer.input_size) + self._terms(layer.width))), ("bias", gates),
                ("w_r", columns * first.projected),
            )
        }  # fmt: skip
        self._memory = memory = Memory(
            **pieces, layers=count * 8 * len(StreamLayer._fields), turns=self.most_members * 8 * LINE,
            h=count * 2 * self._half, c=count * self.batch * padded * self._size,
            m=self.batch * m_row * first.projected, between=2 * self._between * (count > 1),
            sums=self.batch * padded_width * self._size * (first.projected and kernels.products.paired),
            o=self.most_members * self._o,
            x_stage=self.most_members * self._stage, beyond=beyond * max(x_row, h_row, m_row),
        )  # fmt: skip
        memory.clear()
        h = memory.tensor("h", self.operand, count, 2, self.batch, h_row // self.operand.itemsize)
        self.h = h[:, 0, :, : first.width]  # (L, B, P), in the dtype of operands
        self.c = memory.tensor("c", self.compute, count, self.batch, padded)[..., : first.hidden_size]  # (L, B, H)
        memory.array("layers", "int64", count, -1)[:] = [
            StreamLayer(
                memory.at[f"w{index}"], memory.at[f"bias{index}"], memory.at[f"w_r{index}"],
                memory.at["h"] + index * 2 * self._half, memory.at["c"] + index * self.batch * padded * self._size,
                layer.input_size,
            )
            for index, layer in enumerate(layers)
        ]  # fmt: skip

    def arguments(self, fields: dict[str, int], members: int) -> np.ndarray:
        """The arguments of a launch on up to ``members`` threads, a struct each."""
        first, at, block, size = self.layers[0], self._memory.at, self._block, self._size
        depth = max(layer.input_size for layer in self.layers) + first.width
        plan = tiling.plan(1, self.batch, first.hidden_size, depth, 0, block, size, min(members, self.most_members))
        rows = tuple(tiling.balanced_rows(None, self.batch, plan.row_groups))
        ranges, _ = partition(plan, rows, ceil_div(first.width, block.panel), self._panels, False)
        shared = {
            "layers": at["layers"], "layer_count": len(self.layers), "x": 0, "reset": 0, "between": at["between"],
            "between_half": self._between, "between_step": self._between // BAND,
            "m": at["m"], "sums": at["sums"], "band": BAND if len(self.layers) > 1 else 1 << 40,
            "hidden": first.hidden_size, "width": first.width, "h_half": self._half,
            **{name: table.address for name, table in self._tables.items()},
        }  # fmt: skip
        structs = [
            StreamArgs(
                **(shared | fields), turns=at["turns"] + 8 * LINE * member,
                x_stage=at["x_stage"] and at["x_stage"] + member * self._stage, o=at["o"] + member * self._o,
                **dict(zip(PARTITION, map(int, own), strict=True)), counter=0,
            )
            for member, own in enumerate(ranges)
        ]  # fmt: skip
        return np.array(structs, np.int64)

    @process.one_torch_thread
    def pack(self, weights: Sequence[Weights]) -> None:
        """Packs the weights of each layer: into the same memory each time."""
        jobs, kept, at, block = list[Job](), list[Any](), self._memory.at, self._block
        with torch.no_grad():
            for index, (layer, own) in enumerate(zip(self.layers, weights, strict=True)):
                biases = [None if b is None else b.to(self.compute).contiguous() for b in (own.bias_ih, own.bias_hh)]
                b_ih, b_hh = (0 if bias is None else bias.data_ptr() for bias in biases)
                hidden, target = layer.hidden_size, at[f"w{index}"]
                panel = GATES * self._block.lanes * self._size
                both = panel * (self._terms(layer.input_size) + self._terms(layer.width))
                for w, depth in ((own.weight_ih, layer.input_size), (own.weight_hh, layer.width)):
                    w = w.to(self.operand).contiguous()
                    jobs.append(Job(PACK_GATES, self._panels, target, w.data_ptr(), depth, hidden, panel_bytes=both))
                    target += panel * self._terms(depth)
                    kept.append(w)
                jobs.append(Job(PACK_BIAS, self._panels, at[f"bias{index}"], b_ih, 1, hidden, other=b_hh))
                if own.weight_hr is not None:
                    transposed = own.weight_hr.to(self.operand).T.contiguous()  # (H, P)
                    columns, rows = ceil_div(layer.width, block.panel), multiples(hidden, 1)
                    source, target = transposed.data_ptr(), at[f"w_r{index}"]
                    jobs.append(Job(PACK_COLUMNS, columns, target, source, hidden, layer.width, rows.address))
                    kept += [transposed, rows]
                kept += biases
        table = np.array(jobs, np.int64)
        arguments = np.array(JobsArgs(buffers.address_of(table), len(jobs), 0, 1), np.int64)
        kernels_of(self.dtype).jobs()(buffers.address_of(arguments))
        del kept  # in use until here


def _entry_point(kernel: Any) -> Any:
    """The compiled function itself: called directly it takes half the time that Numba's dispatcher does."""
    (compiled,) = kernel.overloads.values()
    return compiled.entry_point
