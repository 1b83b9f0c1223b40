"""How the rows of a call lie in the GPU kernels' memory: flat, (N, ·), and the ways there and back.

The order is the one that suits the caller: step by step, row by row where the batch is first in memory, packed where
rows are ragged.  Padded ragged tensors are gathered first and scattered last.  All of it is torch operations on the
device; only a ragged call copies a small table there.

T time, B batch, B' rows with at least one step, N alive rows over all steps, P features, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import Rows


class FlatRows:
    """The kernels' order of a call's rows: (t, row) lies at ``t * step + row * stride``, or ``offsets[t] + row``."""

    def __init__(self, rows: Rows, device: torch.device, reset: Tensor | None) -> None:
        self._rows, self.device = rows, device
        self.steps, self.batch, self.total = rows.steps, rows.batch, rows.total
        self.ragged = rows.batch_sizes is not None
        self.by_row = rows.batch_first and not self.ragged  # a row's steps lie behind each other
        self.step, self.stride = (1, self.steps) if self.by_row else (self.batch, 1)
        self.starting = self.batch  # B'
        self.index: Tensor | None = None  # (N,) of padded ragged rows: where they lie in the caller's tensor
        self.order: Tensor | None = None  # (B,) of padded ragged rows: the caller's row of each of ours
        self.offsets: Tensor | None = None  # (T + 1,) of ragged rows: where each step begins
        if rows.batch_sizes is not None:
            self._ragged(rows, rows.batch_sizes)
        self.reset = None if reset is None else self.flat(reset.unsqueeze(-1)).squeeze(-1).view(torch.uint8)  # (N,)

    def _ragged(self, rows: Rows, batch_sizes: Tensor) -> None:
        sizes = batch_sizes.to("cpu")
        ends = torch.cumsum(sizes, 0)
        self.starting = int(sizes[0])  # rows with a step at all
        lengths = self.steps - torch.searchsorted(sizes.flip(0), torch.arange(self.starting), right=True)
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
        if self._rows.packed:
            return tensor.contiguous()
        if self._rows.batch_first:
            tensor = tensor.transpose(0, 1)
        flat = tensor.reshape(self.steps * self.batch, tensor.shape[-1])
        return flat.contiguous() if self.index is None else flat.index_select(0, self.index)

    def unflat(self, flat: Tensor) -> Tensor:
        """The inverse of :meth:`flat`, zero where rows are padded; shares memory with ``flat`` where it can."""
        if self._rows.packed:
            return flat
        shape = (self.batch, self.steps) if self._rows.batch_first else (self.steps, self.batch)
        if self.index is not None:
            dense = flat.new_zeros(self.steps * self.batch, flat.shape[-1])
            flat = dense.index_copy_(0, self.index, flat)
        result = flat.view(*shape, flat.shape[-1])
        return result.transpose(0, 1) if self._rows.batch_first else result

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

    def entering(self, h_0: Tensor, direction: int) -> Tensor:
        """(B', P): h_0 (D, B, P) of the rows with a step, zero where the first step is reset."""
        return self.unless_reset(self.sorted(h_0)[direction, : self.starting], direction)

    def unless_reset(self, state: Tensor, direction: int) -> Tensor:
        """(B', P), zero where the first step of a row's walk is reset."""
        if self.reset is None:
            return state
        return state.masked_fill(self.take(self.reset[:, None], direction, True) != 0, 0)

    def places(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, R): where ``rows`` (R,) lie at every step, and whether they are alive there (None: all are)."""
        steps = torch.arange(self.steps, device=self.device)[:, None]
        if self.offsets is None:
            return steps * self.step + rows * self.stride, None
        at = self.offsets[:-1, None] + rows
        alive = at < self.offsets[1:, None]
        return at.clamp(max=self.total - 1), alive

    def by_step(self, values: Tensor, result: Tensor) -> None:
        """Writes (N,) values to (T, B), rows in the kernels' order."""
        if self.ragged:
            result[self._step_of, self._row_of] = values
        else:
            result.copy_(self.stepwise(values[:, None]).squeeze(-1))
