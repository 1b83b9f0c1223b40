"""Truncated back-propagation through time: a long sequence in chunks, with the state carried from one to the next.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one), L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstmcore import checks, stock
from lstmcore.module import LSTM

State = tuple[Tensor, Tensor]


def truncated(
    module: Callable[..., Any],
    input: Tensor | PackedSequence,
    *,
    steps: int,
    hx: State | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    batch_first: bool | None = None,
) -> Truncated:
    """The chunks of a long sequence, for truncated back-propagation through time (Williams & Peng 1990).

    Each chunk starts from the state that the one before ended in, detached: gradients stop at its border.  Values are
    those of one call over the whole sequence (with ``backend="numba"`` to the bit, but in 16-bit dtypes, whose states
    are rounded between chunks)::

        for chunk in lstmcore.truncated(lstm, input, steps=256, lengths=lengths):
            output, _ = chunk.run()
            loss(head(output), chunk.of(target)).backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        module: an LSTM in one direction, of ours or torch's, or a model that is called like one: ``module(input, hx)``
            gives ``(output, (h, c))``.  ``lengths`` and ``reset`` are passed on by name; torch's LSTM does not have
            them.
        input: (T, B, I), (B, T, I) when batch_first, (T, I) unbatched, or a ``PackedSequence`` of (N, I).
        steps: of a chunk; the last has the rest.
        hx: the initial states, as of the module; the first chunk gets them as they are, not detached.
        lengths: (B,), the number of steps of each row of a padded batch.  The state of a row that has ended stays.
        reset: bool, as of :func:`lstmcore.lstm`, over the whole sequence: where True, a row's state is zeroed before
            the step.
        batch_first: whether padded input has B before T; None: as the module says.

    Returns:
        An iterator over chunks, with the state that has been reached: a :class:`lstmcore.truncation.Truncated` of
        :class:`lstmcore.truncation.Chunk`.

    Raises:
        TypeError: ``steps`` that are not an integer; input that is not a tensor; ``lengths`` or ``reset`` of a wrong
            dtype, or for torch's LSTM.
        ValueError: ``steps`` below 1; a bidirectional module (its second direction starts at the end); input of a
            wrong rank; ``lengths`` out of range, or with packed input.
        RuntimeError: T = 0; sizes that do not fit.
    """
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        raise TypeError(f"steps should be an integer, got: {steps!r}")
    if steps < 1:
        raise ValueError(f"steps should be at least 1, got {steps}")
    if not callable(module):
        raise TypeError(f"module should be an LSTM or a model that is called like one, got: {type(module).__name__}")
    if not isinstance(input, (Tensor, PackedSequence)):
        raise TypeError(f"input should be a tensor or a PackedSequence, got: {type(input).__name__}")
    if getattr(module, "bidirectional", False):
        raise ValueError("a bidirectional module cannot run in chunks: its second direction starts at the end")
    extended = lengths is not None or reset is not None
    if extended and isinstance(module, stock.LSTM) and not isinstance(module, LSTM):
        raise TypeError("torch.nn.LSTM has neither lengths nor reset: use lstmcore.LSTM, which loads its state_dict")
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("lengths go with padded input; a PackedSequence carries its own")
        return Truncated(module, _Packed(input, reset), int(steps), hx)
    rows_first = getattr(module, "batch_first", False) if batch_first is None else batch_first
    return Truncated(module, _Padded(input, lengths, reset, rows_first), int(steps), hx)


class Truncated(Iterator["Chunk"]):
    """The chunks of a sequence; ``len()`` of it is their number.

    Raises RuntimeError if the next chunk is asked for before the last one was run.
    """

    def __init__(self, module: Callable[..., Any], sequence: _Padded | _Packed, steps: int, hx: State | None) -> None:
        self._module, self._sequence, self._steps, self._begin = module, sequence, steps, 0
        self._state = hx
        self._chunk: Chunk | None = None

    def __len__(self) -> int:
        return -(-self._sequence.steps // self._steps)

    def __next__(self) -> Chunk:
        chunk = self._chunk
        if chunk is not None and not chunk.done:
            raise RuntimeError(f"the chunk of steps {chunk.steps.start} to {chunk.steps.stop} was not run: call run()")
        begin, end = self._begin, min(self._begin + self._steps, self._sequence.steps)
        if begin >= end:
            raise StopIteration
        if begin and self._state is not None:
            h, c = checks.states(self._state, True, True)
            self._state = h.detach(), c.detach()
        chunk = self._chunk = Chunk(self, slice(begin, end))
        self._begin = end
        return chunk

    @property
    def state(self) -> State | None:
        """``(h, c)`` after the last chunk that was run, in the caller's order of rows: at the end that of the whole
        sequence, (L, B, P) and (L, B, H).  Set it to start the next chunk from another.
        """
        return self._state

    @state.setter
    def state(self, state: State | None) -> None:
        self._state = state

    def reset(self, rows: Any = None) -> None:
        """The next chunk starts from zeros in all rows, or in ``rows``: indices, or a bool mask (B,).

        Raises:
            IndexError: an index out of range, or a mask of another size.
            TypeError: neither indices nor bools.
        """
        if self._state is None or rows is None:
            self._state = None
            return
        kept = [each.detach().clone() for each in self._state]
        for each in kept:
            rows_of = each if each.dim() == 3 else each[:, None]  # (L, B, ·)
            rows_of[:, checks.row_indices(rows, rows_of.shape[1]).to(each.device)] = 0
        self._state = kept[0], kept[1]


class Chunk:
    """Some steps of a sequence.

    Attributes:
        steps: a slice, the steps of the whole sequence.
        input: the chunk's part of the input; packed: the rows that have step ``steps.start``, sorted as the input's.
        hx: the states that its rows start from, in the order of ``input``; None for zeros.
        options: ``lengths`` and ``reset`` of the chunk, if there are any.
        done: whether it was run.
    """

    def __init__(self, whole: Truncated, steps: slice) -> None:
        self._whole, self.steps, self.done = whole, steps, False
        self.input: Tensor | PackedSequence
        self.input, self.options = whole._sequence.part(steps)
        self._start = whole._state
        self.hx = None if self._start is None else whole._sequence.states_in(self._start, steps)

    def run(self) -> tuple[Any, State]:
        """Calls the module.

        Returns:
            ``output, (h, c)``: the output of the chunk, and the states after it of all rows in the caller's order, from
            which the next chunk will start.  It can be called again, as an optimizer's closure does: the last counts.
        """
        output, states = self._whole._module(self.input, self.hx, **self.options)
        self._whole._state = self._whole._sequence.states_out(states, self._start, self.steps)
        self.done = True
        return output, self._whole._state

    def of(self, tensor: Any) -> Any:
        """The chunk's part of a tensor laid out as the whole input is, such as a target: (T, B, ...), (B, T, ...) when
        batch_first, (T, ...) unbatched; packed: (N, ...), or a ``PackedSequence``.

        Raises:
            RuntimeError: of other sizes than the input's.
            TypeError: not a tensor.
        """
        return self._whole._sequence.of(tensor, self.steps)


def _laid_out(tensor: Any, first: tuple[int, ...]) -> None:
    """Raises RuntimeError unless the first dimensions of ``tensor`` are ``first``, TypeError for what is no tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"Expected a tensor, got {type(tensor).__name__}")
    if tensor.shape[: len(first)] != first:
        raise RuntimeError(
            f"Expected a tensor laid out like the input, with sizes {first} before others, got {tuple(tensor.shape)}"
        )


class _Padded:
    """A padded sequence, which is divided along time."""

    def __init__(self, input: Tensor, lengths: Any, reset: Tensor | None, batch_first: bool) -> None:
        data, batched = checks.time_first("LSTM", input, batch_first)
        self.steps, batch = data.shape[0], data.shape[1]
        checks.some_steps(self.steps)
        self._input, self._reset, self._time = input, reset, int(batched and batch_first)
        self._lengths = None if lengths is None else self._checked(lengths, batch, input.device)
        if reset is not None:
            checks.check_reset(reset, tuple(input.shape[:-1]), input.device)

    def _checked(self, lengths: Any, batch: int, device: torch.device) -> Tensor:
        found = checks.check_lengths(lengths, False, batch, device)
        if found.device.type == "cpu" and len(found) and not 0 <= int(found.min()) <= int(found.max()) <= self.steps:
            raise ValueError(f"lengths should be from 0 to {self.steps} (the steps of input), got {found.tolist()}")
        return found

    def part(self, steps: slice) -> tuple[Tensor, dict[str, Tensor]]:
        options = {}
        if self._lengths is not None:
            options["lengths"] = (self._lengths - steps.start).clamp(0, steps.stop - steps.start)
        if self._reset is not None:
            options["reset"] = self.of(self._reset, steps)
        return self.of(self._input, steps), options

    def of(self, tensor: Tensor, steps: slice) -> Tensor:
        _laid_out(tensor, tuple(self._input.shape[:-1]))
        return tensor.narrow(self._time, steps.start, steps.stop - steps.start)

    def states_in(self, states: State, steps: slice) -> State:
        return states

    def states_out(self, states: State, before: State | None, steps: slice) -> State:
        return states


class _Packed:
    """A packed sequence: chunks lose the rows that have ended, which are the last of the sorted ones."""

    def __init__(self, input: PackedSequence, reset: Tensor | None) -> None:
        data, batch_sizes, self._sorted, self._unsorted = input
        data, sizes = checks.packed(data, batch_sizes, self._sorted)
        self._data, self._reset, self._sizes, self.steps = data, reset, torch.from_numpy(sizes), len(sizes)
        self._starts = np.concatenate(([0], np.cumsum(sizes))).tolist()
        if reset is not None:
            checks.check_reset(reset, (len(data),), data.device)

    def part(self, steps: slice) -> tuple[PackedSequence, dict[str, Tensor]]:
        options = {} if self._reset is None else {"reset": self.of(self._reset, steps)}
        return PackedSequence(self.of(self._data, steps), self._sizes[steps].clone()), options

    def of(self, tensor: Any, steps: slice) -> Any:
        if isinstance(tensor, PackedSequence):
            if not torch.equal(tensor.batch_sizes, self._sizes):
                raise RuntimeError("Expected a PackedSequence laid out like the input, got one of other batch_sizes")
            return PackedSequence(self.of(tensor.data, steps), self._sizes[steps].clone())
        _laid_out(tensor, (self._starts[-1],))
        return tensor[self._starts[steps.start] : self._starts[steps.stop]]

    def states_in(self, states: State, steps: slice) -> State:
        """The states of the rows that have the first of ``steps``, sorted."""
        rows, batch = int(self._sizes[steps.start]), int(self._sizes[0])
        states = checks.states(states, True, True)
        for which, each in enumerate(states):
            if each.dim() != 3 or each.shape[1] != batch:
                raise RuntimeError(f"Expected hidden[{which}] of {batch} rows, got {tuple(each.shape)}")
        if self._sorted is not None:
            states = states[0].index_select(1, self._sorted), states[1].index_select(1, self._sorted)
        return states[0][:, :rows], states[1][:, :rows]

    def states_out(self, states: State, before: State | None, steps: slice) -> State:
        """The states of all rows in the caller's order; of rows that have ended, those ``before``."""
        h, c = states
        rows, batch = h.shape[1], int(self._sizes[0])
        if rows < batch:
            kept = self._sorted_states(before, states, batch)
            h, c = torch.cat([h, kept[0][:, rows:]], 1), torch.cat([c, kept[1][:, rows:]], 1)
        if self._unsorted is not None:
            h, c = h.index_select(1, self._unsorted), c.index_select(1, self._unsorted)
        return h, c

    def _sorted_states(self, before: State | None, like: State, batch: int) -> State:
        if before is None:  # they were reset after these rows had ended
            h, c = (each.new_zeros(each.shape[0], batch, each.shape[2]) for each in like)
            return h, c
        if self._sorted is None:
            return before
        return before[0].index_select(1, self._sorted), before[1].index_select(1, self._sorted)
