"""``record_gradient_flow``: the norms and gates of every LSTM of a model, from the backward passes of its training.

T steps, B rows of the batch, D directions.
"""

from __future__ import annotations

import functools
import itertools
import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lstmcore import recording
from lstmcore.flow.record import Gates, Norms, Record, entering_of
from lstmcore.flow.rnn import RNN
from lstmcore.module import LSTM
from lstmcore.recording import Observation

if TYPE_CHECKING:
    from lstmcore.flow.summary import Summary

# Norms are kept raw until they are read, so that training is not delayed.  Means and quantiles take less memory only if
# there are more rows than this; then at most so many bytes are kept raw.
PENDING_ROWS = 24
PENDING = 64 << 20
RECORDED = (LSTM, RNN)


class GradientFlow:
    """The recording that :func:`record_gradient_flow` makes; a context manager.

    Attributes:
        passes: backward passes seen, recorded or not.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        rows: bool,
        gate_rows: int,
        scaler: Any,
        error_if_nonfinite: bool,
        log: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is a number of backward passes: expected 1 or more, got {every}")
        if gate_rows < 0:
            raise ValueError(f"gate_rows is a number of rows of the batch: expected 0 or more, got {gate_rows}")
        self._modules: dict[nn.Module, str] = {
            module: name for name, module in model.named_modules() if isinstance(module, RECORDED)
        }
        if not self._modules:
            others = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.RNNBase)})
            found = f"; it has {', '.join(others)} of torch's, which keep nothing to record" if others else ""
            raise ValueError(
                f"{type(model).__name__} has no lstmcore.LSTM inside{found}: build it with lstmcore.LSTM in place of "
                f"torch.nn.LSTM (a state_dict loads either way)"
            )
        for module, name in self._modules.items():
            if getattr(module, "backend", None) == "torch":
                raise ValueError(
                    f"{name or 'the module'} has backend='torch', that is ATen's LSTM, which keeps nothing to record: "
                    f"set its .backend to 'auto'"
                )
        self.gate_rows = gate_rows
        self.passes = 0
        self._every, self._rows, self._scaler, self._log = every, rows, scaler, log
        self._error_if_nonfinite = error_if_nonfinite
        self._lock = threading.Lock()
        self._tasks: dict[int, int] = {}  # our number of each backward pass that runs now, by autograd's
        self._pending: list[tuple[int, Observation]] = []
        self._pending_bytes = 0
        self._records: list[Record] = []
        self._treated = 0  # records that have been logged and checked

    def __enter__(self) -> GradientFlow:
        recording.watch(list(self._modules), self)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        recording.unwatch(self)
        if error_type is not None:
            return
        if not self.passes:
            names = ", ".join(name or type(module).__name__ for module, name in self._modules.items())
            raise RuntimeError(
                f"nothing was recorded: no backward pass came through {names} inside the context. Call loss.backward() "
                f"inside it, on a loss that depends on the module's output; and run the forward pass inside it too, "
                f"since outside it ATen's LSTM may run, which keeps nothing to record"
            )
        if not self._error_if_nonfinite and self._suspicious():
            bad = next((record for record in self.records if not _finite(record)), None)
            if bad is not None:
                warnings.warn(_nonfinite(bad), RuntimeWarning, stacklevel=2)

    def _suspicious(self) -> bool:
        """Whether any norm is not finite, without computing means and quantiles."""
        if any(not np.isfinite(observation.norms.cpu().numpy()).all() for _, observation in self._pending):
            return True
        return not all(map(_finite, self._records))

    # Called by the nodes of the graph, on the thread that runs them.

    def wants(self) -> bool:
        task = torch._C._current_graph_task_id()
        with self._lock:
            new = task not in self._tasks
            if new:
                self._tasks[task] = self.passes
                self.passes += 1
            number = self._tasks[task]
        if new:  # called back when this backward pass has ended
            callback = functools.partial(self._ended, task)
            torch.autograd.Variable._execution_engine.queue_callback(callback)
        return number % self._every == 0

    def observe(self, observation: Observation) -> None:
        norms, entering = observation.norms, observation.entering
        if self._scaler is not None:  # divides by the loss scale on its device, without waiting for it
            scale = self._scaler.scale(torch.ones((), device=norms.device))
            observation = observation._replace(norms=norms / scale, entering=entering / scale)
        with self._lock:
            self._pending.append((self._tasks[torch._C._current_graph_task_id()], observation))
            if norms.shape[-1] > PENDING_ROWS:
                self._pending_bytes += norms.numel() * norms.itemsize

    def _ended(self, task: int) -> None:
        with self._lock:
            recorded = self._tasks.pop(task) % self._every == 0
            full = self._pending_bytes > PENDING
        if not recorded or not (full or self._log is not None or self._error_if_nonfinite):
            return
        fresh = self.records[self._treated :]
        self._treated += len(fresh)
        if self._log is not None:
            self._hand_over(fresh, self._log)
        if self._error_if_nonfinite:
            for record in fresh:
                if not _finite(record):
                    raise RuntimeError(_nonfinite(record))

    # Called by the user.

    @property
    def records(self) -> list[Record]:
        """One for every recorded backward pass, module, layer and direction, in that order."""
        with self._lock:
            pending, self._pending, self._pending_bytes = self._pending, [], 0
        for _, of_pass in itertools.groupby(pending, key=lambda each: each[0]):
            self._records += self._records_of(list(of_pass))
        return self._records

    def select(
        self,
        module: str | None = None,
        layer: int | None = None,
        direction: int | None = None,
        iteration: int | None = None,
    ) -> list[Record]:
        """Some of the records.

        Args:
            module: of the module of this name; None: of all.
            layer: of this layer; None: of all.
            direction: of this direction, 0 or 1; None: of both.
            iteration: of this backward pass (-1: of the last recorded); None: of all.

        Raises:
            ValueError: there is no such record; the message names those that exist.
        """
        records = self.records
        if iteration is not None and iteration < 0 and records:
            known = sorted({record.iteration for record in records})
            iteration = known[iteration] if -iteration <= len(known) else iteration
        wanted = {"module": module, "layer": layer, "direction": direction, "iteration": iteration}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        found = [r for r in records if all(getattr(r, name) == value for name, value in wanted.items())]
        if not found:
            there = {name: sorted({getattr(r, name) for r in records}) for name in wanted}
            raise ValueError(
                f"no record of {', '.join(f'{name} {value!r}' for name, value in wanted.items())}: recorded were "
                f"{'; '.join(f'{name} {_listed(values)}' for name, values in there.items())}"
            )
        return found

    def summary(self) -> Summary:
        """The findings of the recording as text, with advice; print it."""
        from lstmcore.flow.summary import summarize

        return summarize(self.records)

    def plot(self, folder: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
        """Writes all figures for which there are records into ``folder``; returns their paths.  Needs matplotlib.

        Args:
            folder: is created if it does not exist.
            formats: of the files, those that matplotlib writes.
        """
        from lstmcore.flow.plots import plot_all

        return plot_all(self.records, folder, formats)

    def to_csv(self, path: str | Path) -> Path:
        """Writes a table; see :func:`lstmcore.flow.export.to_csv`."""
        from lstmcore.flow.export import to_csv

        return to_csv(self.records, path)

    def to_json(self, path: str | Path) -> Path:
        """Writes everything; see :func:`lstmcore.flow.export.to_json`.  ``from_json`` there reads it back."""
        from lstmcore.flow.export import to_json

        return to_json(self.records, path)

    def log(self, to: Any) -> None:
        """Hands the main numbers of each record to a logger; see :func:`lstmcore.flow.export.log`."""
        self._hand_over(self.records, to)

    @staticmethod
    def _hand_over(records: Sequence[Record], to: Any) -> None:
        from lstmcore.flow.export import log

        log(records, to)

    def _records_of(self, observed: list[tuple[int, Observation]]) -> list[Record]:
        """The records of one backward pass."""
        names = list(self._modules.values())
        calls: Counter[tuple[str, int]] = Counter()
        records = []
        for iteration, (source, norms, lengths, entering, entering_lengths, gates) in observed:
            module = source.module()
            name = self._modules[module] if module is not None else ""
            call = calls[name, source.layer]
            calls[name, source.layer] += 1
            for d in range(norms.shape[1]):
                each = Norms.of(norms[:, d], lengths, d, self._rows)
                enters = entering_of(entering[d], entering_lengths, d)
                records.append(
                    Record(
                        iteration,
                        name,
                        source.layer,
                        d,
                        call,
                        h=each[0],
                        c=each[1] if len(each) == 2 else None,
                        entering=enters[0],
                        entering_by_lag=enters[1],
                        gates=None if gates is None else Gates.of(gates, d),
                    )
                )
        # in backward the last layer, and the last module, come first
        return sorted(records, key=lambda r: (names.index(r.module), r.call, r.layer, r.direction))


def _listed(values: list[Any]) -> str:
    return ", ".join(map(repr, values[:5])) + (f", ... {values[-1]!r}" if len(values) > 5 else "")


def _finite(record: Record) -> bool:
    """Whether all norms of a record are finite; NaN, where a row is not active, does not count."""
    return not any(state.mean.isinf().any() for state in (record.h, record.c) if state is not None)


def _nonfinite(record: Record) -> str:
    curves = [state.mean_by_lag for state in (record.h, record.c) if state is not None]
    lag = min(int(curve.isinf().nonzero()[0]) for curve in curves if curve.isinf().any())
    return (
        f"the gradient is not finite in {record.name}, {lag} steps before the end of the sequence and from there "
        f"back, in backward pass {record.iteration}. Look for NaN or infinity in the input and the loss "
        f"(torch.autograd.set_detect_anomaly(True) names the operation), clip gradients, or lower the learning rate; "
        f"under float16 autocast with a GradScaler a few such passes are normal, and are skipped by it"
    )


def record_gradient_flow(
    model: nn.Module,
    every: int = 1,
    *,
    rows: bool = False,
    gate_rows: int = 2,
    scaler: Any = None,
    error_if_nonfinite: bool = False,
    log: Any = None,
) -> GradientFlow:
    """Records what happens to the gradient on its way back through time, in every LSTM inside ``model``.

    The context may span one backward pass or a whole training.  For each layer, direction and step it takes the
    Euclidean norms of dL/dh_t and dL/dc_t of every row, as the backward kernel computes them, and statistics of the
    input, forget and output gates; nothing about the training changes, except that within the context
    ``backend="auto"`` does not choose ATen's LSTM, which cannot be recorded.  Outside a context it costs nothing.
    Each backward pass counts as one: under gradient accumulation, each micro-batch.

    Args:
        model: a module with one :class:`lstmcore.LSTM` or more inside (also :class:`lstmcore.RNN`), or one itself.
        every: records backward passes 0, every, 2 every, ...
        rows: also keeps the norms of every row, ``record.h.rows`` (T, B).
        gate_rows: how many rows of the batch, evenly spread, the statistics of the gates are taken over; 0 for none.
        scaler: the ``torch.amp.GradScaler`` that scales the loss, so that its scale is divided out.
        error_if_nonfinite: raise RuntimeError from the backward pass whose norms are not all finite, instead of
            warning at the end of the context.
        log: a TensorBoard ``SummaryWriter`` or a callable ``(numbers: dict[str, float], iteration: int)``, which gets
            the main numbers after every recorded backward pass.

    Returns:
        A context manager, the :class:`GradientFlow`: its ``records``, ``summary()``, ``plot(folder)``, ``to_csv``,
        ``to_json``, ``log`` and ``select`` may be used inside the context and after it.

    Raises:
        ValueError: nothing to record in ``model``; ``every`` or ``gate_rows`` out of range.
        RuntimeError: at the end of the context, when no backward pass came through the model inside it.

    Examples:
        >>> model = lstmcore.LSTM(8, 32)
        >>> with lstmcore.record_gradient_flow(model) as flow:
        ...     model(torch.randn(100, 4, 8))[0][-1].sum().backward()
        >>> record = flow.records[0]
        >>> record.name, record.steps, record.c.mean.shape
        ('layer 0', 100, torch.Size([100]))
    """
    return GradientFlow(model, every, rows, gate_rows, scaler, error_if_nonfinite, log)
