"""LSTM and LSTMCell: parameters, names and state_dict of torch.nn's modules, computed by :func:`lstmcore.lstm`.

T time, B batch, N tokens: (step, row) pairs, I input, H hidden, P projection (H without one), L layers,
D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from lstmcore import backends, direct, functional, init, scripting, stock
from lstmcore import recompute as recomputing
from lstmcore.quantization import QConfig


class LSTM(nn.RNNBase):
    """A multi-layer LSTM: ``torch.nn.LSTM`` with faster kernels.

    Parameters, their names, order and initialisation (the same seed gives the same weights), ``state_dict``, ``repr``,
    shapes, results and errors are those of ``torch.nn.LSTM``; a state_dict loads either way.  The equations are in
    :mod:`lstmcore.kernels`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the states.
        num_layers: L, layers stacked, each over the output of the one before.
        bias: whether the layers have ``bias_ih`` and ``bias_hh``.
        batch_first: input and output are (B, T, ·) instead of (T, B, ·); the states are not affected.
        dropout: the probability of the dropout after every layer but the last, when training.
        bidirectional: run every layer in both directions of time and concatenate their outputs; D = 2.
        proj_size: P, the size h_t is projected to by ``weight_hr``; 0 for none.
        device: of the parameters.
        dtype: of the parameters; float32, float64, bfloat16 and float16 have kernels.
        backend: ``"auto"`` picks the fastest that runs the call; ``"triton"``, ``"numba"``, ``"torch"`` and
            ``"reference"`` insist on one.  :func:`lstmcore.explain` says what runs and why.
        forget_bias: the initial bias of the forget gates of every layer and direction (Jozefowicz et al. 2015);
            see :func:`lstmcore.init.forget_bias_`.
        recompute: None keeps gates and cells of all steps for backward; a number of steps S keeps the states between
            segments of S steps and computes the rest again in backward, with the same results; ``"auto"`` does so where
            they would exceed ``memory_budget``.  See :func:`lstmcore.lstm`.
        memory_budget: with ``recompute="auto"``, bytes of gates and states that a call may keep for backward; None: a
            quarter of the memory that is available.
        chrono: the longest lag in steps that the memory has to span; the biases of the forget and input gates start
            with time constants spread up to it (Tallec & Ollivier 2018); see :func:`lstmcore.init.chrono_`.

    ``forget_bias`` and ``chrono`` are part of :meth:`reset_parameters`; loaded or copied parameters stay as they are.

    Raises:
        ValueError, TypeError: as ``torch.nn.LSTM``; ValueError for an unknown backend, for both of ``forget_bias`` and
            ``chrono``, for either without biases, for a ``forget_bias`` that is not finite or a ``chrono`` below 3; as
            :func:`lstmcore.lstm` for ``recompute`` and ``memory_budget``.

    Examples:
        >>> lstm = lstmcore.LSTM(64, 128, num_layers=2)
        >>> output, (h_n, c_n) = lstm(torch.randn(1000, 8, 64))
        >>> output.shape, h_n.shape
        (torch.Size([1000, 8, 128]), torch.Size([2, 8, 128]))
    """

    backend: str = "auto"
    recompute: int | Literal["auto"] | None = None
    memory_budget: int | None = None
    forget_bias: float | None = None
    chrono: int | None = None
    qconfig = QConfig(nn.LSTM)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        recompute: int | Literal["auto"] | None = None,
        memory_budget: int | None = None,
        forget_bias: float | None = None,
        chrono: int | None = None,
    ) -> None:
        backends.check_name(backend)
        recomputing.asked(recompute, memory_budget)
        init.check_options(forget_bias, chrono, bias)
        # before RNNBase.__init__, which calls reset_parameters()
        if forget_bias is not None:
            self.forget_bias = float(forget_bias)
        if chrono is not None:
            self.chrono = int(chrono)
        nn.RNNBase.__init__(
            self,
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.backend, self.recompute, self.memory_budget = backend, recompute, memory_budget

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_cells: bool | Literal["all"] = False,
    ) -> tuple[Any, ...]:
        """The LSTM over whole sequences; :func:`lstmcore.lstm` has more on the arguments, the shapes and the errors.

        Args:
            input: (T, B, I), (B, T, I) when batch_first, (T, I) unbatched; or a ``PackedSequence`` of (N, I).
            hx: the initial states, (L * D, B, P) and (L * D, B, H), without B when unbatched; None for zeros.
            lengths: (B,), the number of steps of each row of a padded batch; None: all T.
            reset: bool, (T, B), (B, T) when batch_first, (T,) unbatched, or packed (N,): where True, the states of that
                row are zeroed before the step.
            return_cells: also return every c_t of the last layer; ``"all"``: of every layer.

        Returns:
            ``output, (h_n, c_n)`` as ``torch.nn.LSTM`` returns them; with ``return_cells``, ``cells`` as a third.
        """
        if isinstance(input, Proxy):
            return scripting.leaf(self, input, hx, lengths=lengths, reset=reset, return_cells=return_cells)
        try:
            own = self._parameters
            params = [own[name] for name in self._flat_weights_names]
        except KeyError:  # replaced by something else: parametrized, pruned, weight-normed, a data-parallel replica
            params = [getattr(self, name) for name in self._flat_weights_names]
        if lengths is None and reset is None and not return_cells and self.recompute is None:
            found = direct.call(self, input, hx, params, self.backend)  # type: ignore[arg-type]
            if found is not None:
                return found[0], found[1:]
        output, h_n, c_n, *cells = functional.lstm(
            input,
            hx,
            params,  # type: ignore[arg-type]
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            lengths=lengths,
            reset=reset,
            return_cells=return_cells,
            recompute=self.recompute,
            memory_budget=self.memory_budget,
            backend=self.backend,
            module=self,
        )
        return output, (h_n, c_n), *cells

    # What subclasses written for torch.nn.LSTM call.
    get_expected_cell_size = stock.LSTM.get_expected_cell_size
    check_forward_args = stock.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = stock.LSTM.permute_hidden  # type: ignore[assignment]

    def flatten_parameters(self) -> None:
        """Does nothing: parameters need not be contiguous.  It exists for code written for ``torch.nn.LSTM``."""

    def __prepare_scriptable__(self) -> nn.Module:
        """The module that ``torch.jit.script`` compiles instead: torch's, with the same parameters."""
        return scripting.stand_in(self, LSTM, stock.LSTM)

    def reset_parameters(self) -> None:
        """Draws all parameters as ``torch.nn.LSTM`` does, then applies ``forget_bias`` or ``chrono``.

        Raises:
            ValueError: one of them is set and the biases cannot be; nothing is drawn then.
        """
        if self.forget_bias is not None or self.chrono is not None:
            init.check_options(self.forget_bias, self.chrono)
            init.biases(self)
        nn.RNNBase.reset_parameters(self)
        if self.forget_bias is not None:
            init.forget_bias_(self, self.forget_bias)
        if self.chrono is not None:
            init.chrono_(self, self.chrono)

    def extra_repr(self) -> str:
        return nn.RNNBase.extra_repr(self) + "".join(
            f", {name}={getattr(self, name)!r}"
            for name in ("backend", "recompute", "memory_budget", "forget_bias", "chrono")
            if getattr(self, name) != getattr(LSTM, name)
        )


class LSTMCell(nn.RNNCellBase):
    """One step of an LSTM: ``torch.nn.LSTMCell``, with a choice of backend.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the states.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device: of the parameters.
        dtype: of the parameters.
        backend: ``"auto"`` and ``"torch"`` run ATen's fused cell: one step has no recurrence for a kernel to keep in
            cache.  The others run :func:`lstmcore.lstm` over one step.

    Raises:
        ValueError: unknown backend.

    Examples:
        >>> cell = lstmcore.LSTMCell(64, 128)
        >>> h, c = cell(torch.randn(8, 64))
        >>> h, c = cell(torch.randn(8, 64), (h, c))
        >>> h.shape
        torch.Size([8, 128])
    """

    backend: str = "auto"
    qconfig = QConfig(nn.LSTMCell)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        backends.check_name(backend)
        nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self.backend = backend

    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: (B, I) or (I,).
            hx: the states ``(h_0, c_0)``, each (B, H) or (H,); None for zeros.

        Returns:
            ``(h_1, c_1)``, each (B, H) or (H,).

        Raises:
            ValueError: a wrong rank.
            RuntimeError: sizes and dtypes that do not fit, as ``torch.nn.LSTMCell``.
        """
        if isinstance(input, Proxy):
            return scripting.leaf(self, input, hx)
        return functional.lstm_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, backend=self.backend
        )

    def __prepare_scriptable__(self) -> nn.Module:
        """The module that ``torch.jit.script`` compiles instead: torch's, with the same parameters."""
        return scripting.stand_in(self, LSTMCell, stock.LSTMCell)

    def extra_repr(self) -> str:
        return nn.RNNCellBase.extra_repr(self) + ("" if self.backend == "auto" else f", backend={self.backend!r}")
