"""Memory layout of a call's rows in the GPU kernels: flat (N, ·), and the conversions from and to the caller's layout.

The order follows the caller's: step by step, row by row if the batch is first in memory, packed if rows are ragged.
Padded ragged tensors are gathered first and scattered last.  All of this is torch operations on the device, and the
host waits for none of them; only a call whose lengths the host knows copies a small table to the device.

**Lengths on the device.**  The host then does not know the number of tokens and does not wait for it: flat tensors
have room for T * B.  The tokens come first, packed as usual; the *tail* after them holds the padded positions, in any
order, so that gathering and scattering permute whole tensors.  The recurrence does no work for the tail, but the large
products run over it, since the host would have to know their size.  With lengths on the host no work at all is done for
padding, at the cost of copying the table.

The tail takes part in products, so their operands have to be zero there (zero times NaN or infinity is NaN): ``flat``
gathers zeros, and ``new`` and ``clear`` write them elsewhere.  A row without a step has a position in the tail where
others have their first and last step.

**Backwards.**  A segment of direction 1 is a pass of its own, of one direction.  Its steps lie in the opposite order,
so that it walks them as direction 0 does; more and more rows have a step then.

T time, B batch, B' rows with at least one step (B where lengths are on the device), N tokens: (step, row) pairs (T * B
where lengths are on the device), P features, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Rows
from ..gate_statistics import sampled_rows


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on ``device``, for which the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class FlatRows:
    """The kernels' order of a call's tokens: (t, row) is at ``t * step + row * stride``, or ``offsets[t] + row``.

    ``backwards``: t counts the caller's steps from the last to the first.  Lengths on the device have to be in range.
    """

    def __init__(self, rows: Rows, device: torch.device, reset: Tensor | None, backwards: bool = False) -> None:
        self._rows, self.device, self._backwards = rows, device, backwards
        self.steps, self.batch, self.total = rows.steps, rows.batch, rows.room
        self.ragged = rows.ragged
        self.by_row = rows.batch_first and not self.ragged  # the steps of a row are adjacent
        self.step, self.stride = (1, self.steps) if self.by_row else (self.batch, 1)
        self.starting = self.batch  # B'
        self.index: Tensor | None = None  # (N,) of ragged rows: their index in the caller's tensor, if it is another
        self.order: Tensor | None = None  # (B,) of padded ragged rows: the caller's row of each of ours
        self.offsets: Tensor | None = None  # (T + 1,) of ragged rows: the first token of each step
        self.tail: Tensor | None = None  # (N, 1) bool, if lengths are on the device: positions without a token
        self.empty: Tensor | None = None  # (B, 1) bool, likewise: rows without a step
        # of ragged rows: positions of the first step of each, and of the last one; None: the first B' positions
        self._ends: tuple[Tensor | None, Tensor | None] = None, None
        if rows.lengths is not None:
            self._roomy(rows.lengths)
        elif self.ragged and rows.roomy and not rows.packed:  # no size may depend on the lengths
            self._roomy(upload(rows.row_lengths(), device))
        elif rows.batch_sizes is not None:
            self._packed(rows, rows.batch_sizes.to("cpu"))
        # (N,); of 32 bits: Triton chooses the layout of a product's operands by the narrowest load that they depend on;
        # for bytes it is so wide that a small product reads past its end, with wrong gradients
        self.reset = None if reset is None else self.flat(reset.unsqueeze(-1)).squeeze(-1).to(torch.int32)

    def _packed(self, rows: Rows, sizes: Tensor) -> None:
        """Prepares ragged rows from the number of rows (T,) of each step, on the CPU."""
        self.starting = int(sizes[0])
        lengths = self.steps - torch.searchsorted(sizes.flip(0), torch.arange(self.starting, device="cpu"), right=True)
        if self._backwards:
            sizes = sizes.flip(0)
        ends = torch.cumsum(sizes, 0)
        # where each row's walk ends, or begins; at the other end all rows have a step
        inner = self._walk(lengths - 1)
        if self.starting:
            inner = (ends - sizes)[inner] + torch.arange(self.starting, device="cpu")
        order = [] if rows.order is None else [rows.order]
        table = upload(
            torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), ends, inner, sizes, *order]), self.device
        )
        parts = (self.steps + 1, self.starting, self.steps, self.batch * len(order))
        self.offsets, inner, sizes, user = table.split(parts)
        if self._backwards:
            self._ends = inner, torch.arange(self.total - self.starting, self.total, device=self.device)
        else:
            self._ends = None, inner
        # of each token: its step, and its row among the sorted ones
        self._step_of = torch.repeat_interleave(
            torch.arange(self.steps, device=self.device), sizes, output_size=self.total
        )
        self._row_of = torch.arange(self.total, device=self.device) - self.offsets[self._step_of]
        if not rows.packed:
            self.order = user
            self._index()
        elif self._backwards:  # after a step in this order come those before it in the caller's
            self.index = self.total - self.offsets[self._step_of + 1] + self._row_of

    def _roomy(self, lengths: Tensor) -> None:
        """Prepares ragged rows from lengths (B,) in the caller's order, on the device, from 0 to T."""
        lengths, self.order = torch.sort(lengths, descending=True, stable=True)
        entries = torch.arange(self.total, device=self.device)  # of a table (T, B)
        times = self._walk(torch.arange(self.steps, device=self.device))
        active = (lengths > times[:, None]).flatten()
        count = active.cumsum(0)
        self.offsets = torch.nn.functional.pad(count[self.batch - 1 :: self.batch], (1, 0))
        total = count[-1:]
        # tokens take the positions from 0 on, padding those after them
        place = torch.where(active, count - 1, total + entries - count)
        entry_of = torch.empty_like(entries).scatter_(0, place, entries)
        self._step_of = entry_of // self.batch
        self._row_of = entry_of - self._step_of * self.batch
        self.tail, self.empty = (entries >= total)[:, None], (lengths == 0)[:, None]
        table = place.view(self.steps, self.batch)
        inner = table.gather(0, self._walk((lengths - 1).clamp_(min=0))[None])[0]
        self._ends = (inner, table[-1]) if self._backwards else (table[0], inner)
        self._index()

    def _walk(self, steps: Tensor) -> Tensor:
        """The caller's steps in the kernels' order, and the other way round."""
        return self.steps - 1 - steps if self._backwards else steps

    def _index(self) -> None:
        assert self.order is not None
        user, step = self.order[self._row_of], self._walk(self._step_of)
        self.index = user * self.steps + step if self._rows.batch_first else step * self.batch + user

    def flat(self, tensor: Tensor) -> Tensor:
        """(N, ·), contiguous, in the kernels' order, from a tensor of the caller's rows; zero in the tail."""
        if self._rows.packed:
            return tensor.contiguous() if self.index is None else tensor.index_select(0, self.index)
        if self.index is None:
            tensor = self.in_time(tensor, 0)
        if self._rows.batch_first:
            tensor = tensor.transpose(0, 1)
        flat = tensor.reshape(self.steps * self.batch, tensor.shape[-1])
        return flat.contiguous() if self.index is None else self.clear(flat.index_select(0, self.index))

    def unflat(self, flat: Tensor) -> Tensor:
        """The inverse of :meth:`flat`, zero at padding; shares memory with ``flat`` if possible."""
        if self._rows.packed:
            return flat if self.index is None else torch.empty_like(flat).index_copy_(0, self.index, flat)
        shape = (self.batch, self.steps) if self._rows.batch_first else (self.steps, self.batch)
        if self.index is not None:
            make = flat.new_zeros if self.tail is None else flat.new_empty  # a tail fills the rest
            flat = make(self.steps * self.batch, flat.shape[-1]).index_copy_(0, self.index, flat)
        result = flat.view(*shape, flat.shape[-1])
        result = result.transpose(0, 1) if self._rows.batch_first else result
        return self.in_time(result, 0) if self.index is None else result

    def in_time(self, each: Tensor, dim: int) -> Tensor:
        """Values of the kernels' steps along ``dim`` in the order of the caller's, and the other way round."""
        return each.flip(dim) if self._backwards else each

    def clear(self, flat: Tensor) -> Tensor:
        """Zeroes the tail of (N, ·) in place and returns it."""
        return flat if self.tail is None else flat.masked_fill_(self.tail, 0)

    def new(self, like: Tensor, *shape: int) -> Tensor:
        """A new tensor whose tokens the recurrence will write; zero in the tail."""
        return like.new_empty(shape) if self.tail is None else like.new_zeros(shape)

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
        """(B', ·), maybe a view: each row's value at the first or last step of its walk, arbitrary if it has none."""
        at_zero = first == (direction == 0)
        if not self.ragged:
            return self.stepwise(flat)[0 if at_zero else -1]
        at = self._ends[not at_zero]
        return flat[: self.starting] if at is None else flat.index_select(0, at)

    def _put(self, flat: Tensor, at_zero: bool, values: Tensor) -> None:
        """Writes (B', ·) values to step 0 or the last step of each ragged row; into the tail if it has none."""
        at = self._ends[not at_zero]
        if at is None:
            flat[: self.starting] = values
        else:
            flat.index_copy_(0, at, values)

    def add_at_first(self, flat: Tensor, direction: int, left: Tensor, right: Tensor) -> None:
        """Adds ``left @ right`` (B', ·) to the value of each row at the first step of its walk."""
        if not self.ragged or self._ends[direction] is None:
            self.take(flat, direction, True).addmm_(left, right)
        else:
            self._put(flat, direction == 0, torch.addmm(self.take(flat, direction, True), left, right))

    @property
    def may_pass(self) -> bool:
        """Whether there may be rows without a step, for which :meth:`passes` has to be called."""
        return self.starting < self.batch or self.empty is not None

    def passes(self, result: Tensor, state: Tensor | None) -> None:
        """Copies rows without a step from ``state`` (None: zeros) to ``result``; (B, ·), both sorted."""
        if self.empty is None:
            result[self.starting :] = 0 if state is None else state[self.starting :]
        elif state is None:
            result.masked_fill_(self.empty, 0)
        else:
            torch.where(self.empty, state, result, out=result)

    def states_before(self, y: Tensor, h_0: Tensor | None, direction: int) -> Tensor:
        """(N, P): the h that enters each step, from (N, P) y of one direction and (B', P) h_0."""
        if self.ragged:
            before = self._neighbour(-1 if direction == 0 else 1)
            result = y.index_select(0, before)
            self._put(result, direction == 0, torch.zeros_like(result[: self.starting]) if h_0 is None else h_0)
            self.clear(result)
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
        """(N, P): the gradient that each h_t gets from the next step, from those (N, P) of the h that enters each step.

        The transpose of :meth:`states_before`; at a row's last step it is ``h_n`` (B', P).
        """
        if self.reset is not None:
            g = g.masked_fill(self.reset[:, None] != 0, 0)
        if self.ragged:
            result = g.index_select(0, self._neighbour(1 if direction == 0 else -1))
            self._put(result, direction == 1, torch.zeros_like(result[: self.starting]) if h_n is None else h_n)
            return self.clear(result)
        result = g.new_empty(g.shape)
        view, source = self.stepwise(result), self.stepwise(g)
        if direction == 0:
            view[:-1], rest = source[1:], view[-1]
        else:
            view[1:], rest = source[:-1], view[0]
        rest.copy_(h_n) if h_n is not None else rest.zero_()
        return result

    def _neighbour(self, steps: int) -> Tensor:
        """(N,): the position of the same row one step later or earlier; arbitrary if it has no such step."""
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
        """(T, R): the positions of ``rows`` (R,) at every step, and whether they are active there (None: all are)."""
        steps = torch.arange(self.steps, device=self.device)[:, None]
        if self.offsets is None:
            return steps * self.step + rows * self.stride, None
        at = self.offsets[:-1, None] + rows
        active = at < self.offsets[1:, None]
        return at.clamp(max=self.total - 1), active

    def sample(self, wanted: int) -> Tensor:
        """(R,): ``wanted`` of the rows with a step, or all of them; the host waits if lengths are on the device."""
        begun = self.starting if self.empty is None else self.batch - int(self.empty.sum())
        return torch.tensor(list(sampled_rows(begun, wanted)), dtype=torch.int64, device=self.device)

    def users(self, rows: Tensor) -> Tensor:
        """(R,): the caller's index of each of these rows."""
        return rows if self.order is None else self.order[rows]

    def ours(self, users: Tensor) -> Tensor:
        """The inverse of :meth:`users`."""
        if self.order is None:
            return users
        each = torch.arange(self.batch, device=self.device)
        return torch.empty_like(self.order).index_copy_(0, self.order, each)[users]

    def by_step(self, values: Tensor, result: Tensor) -> None:
        """Writes (N,) values to (T, B), rows in the kernels' order."""
        if self.ragged:
            result[self._step_of, self._row_of] = values
        else:
            result.copy_(self.stepwise(values[:, None]).squeeze(-1))
