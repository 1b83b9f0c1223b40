"""The LSTM as a plain, differentiable loop over time: the formula one can read, and the path of double backward.

:func:`forward` answers the backend contract of :mod:`lstmcore.kernels` in ordinary torch operations, so autograd
differentiates it any number of times.  It is the twin of the kernels, not their judge: both take their arithmetic from
``kernels/cell.py``, and the tests compare them with float64 ``torch.nn.LSTM``.

T time, B batch, N alive rows over all steps, n alive rows of one step, I input, H hidden, P projection, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from lstmcore.kernels import cell
from lstmcore.kernels.contract import Forward, Layer, Rows, Weights, state_dtype


def supports(layer: Layer) -> str | None:
    """None: it runs every layer, on every device."""
    return None


def forward(
    input: Tensor,  # (T, B, I) or (N, I)
    h_0: Tensor | None,  # (D, B, P); None for zeros
    c_0: Tensor | None,  # (D, B, H); None for zeros
    weights: Sequence[Weights],
    rows: Rows,
    *,
    reset: Tensor | None = None,  # (T, B) or (N,), bool
    save: bool = False,
    cells: bool = False,
) -> Forward:
    """One layer, differentiable in every floating-point argument; ``save`` is accepted and means nothing here.

    16-bit types compute in float32 and round where the kernels do: h_t, because the next step and the caller read it.
    """
    gates, width = weights[0].weight_hh.shape  # (4H, P)
    if h_0 is None:
        h_0 = input.new_zeros(len(weights), rows.batch, width)
    if c_0 is None:
        c_0 = input.new_zeros(len(weights), rows.batch, gates // 4)
    if rows.order is not None:
        h_0, c_0 = h_0.index_select(1, rows.order.to(h_0.device)), c_0.index_select(1, rows.order.to(c_0.device))
    inputs = _split(input, rows)
    resets = [None] * rows.steps if reset is None else _split(reset[..., None], rows)
    outputs = [
        _direction(inputs, h, c, direction, resets, reverse=d == 1)
        for d, (h, c, direction) in enumerate(zip(h_0, c_0, weights, strict=True))
    ]
    h_n = torch.stack([h for _, _, h, _ in outputs])
    c_n = torch.stack([c for _, _, _, c in outputs])
    if rows.order is not None:
        unsort = torch.argsort(rows.order).to(h_n.device)
        h_n, c_n = h_n.index_select(1, unsort), c_n.index_select(1, unsort)
    output = torch.cat([_join(h, rows) for h, _, _, _ in outputs], dim=-1)
    all_cells = torch.cat([_join(c, rows) for _, c, _, _ in outputs], dim=-1) if cells else None
    return Forward(output, h_n, c_n.to(input.dtype), all_cells, ())


def _direction(
    inputs: Sequence[Tensor],  # T of (n, I)
    h: Tensor,  # (B, P)
    c: Tensor,  # (B, H)
    weights: Weights,
    resets: Sequence[Tensor | None],  # T of (n, 1)
    reverse: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """The loop: every h_t (n, P) and c_t (n, H) in the order of time, then the last state of every row."""
    dtype, state = h.dtype, state_dtype(h.dtype)
    w_ih, w_hh, b_ih, b_hh, w_hr = (None if w is None else w.to(state) for w in weights)
    assert w_ih is not None  # optional only as a gradient, and so is w_hh
    assert w_hh is not None
    c = c.to(state)
    hs, cs = list(inputs), list(inputs)  # every entry is overwritten
    for t in range(len(inputs) - 1, -1, -1) if reverse else range(len(inputs)):
        n = inputs[t].shape[0]  # rows are sorted: the first n are alive, the others keep their state
        h_prev, c_prev = h[:n], c[:n]
        restart = resets[t]
        if restart is not None:
            h_prev, c_prev = h_prev.masked_fill(restart, 0), c_prev.masked_fill(restart, 0)
        z = linear(inputs[t].to(state), w_ih, b_ih) + linear(h_prev.to(state), w_hh, b_hh)  # (n, 4H)
        z_i, z_f, z_g, z_o = z.chunk(4, dim=-1)
        c_t = cell.cell_state(z_i.sigmoid(), z_f.sigmoid(), z_g.tanh(), c_prev)
        h_t = cell.hidden_state(z_o.sigmoid(), c_t.tanh())
        h_t = (h_t if w_hr is None else linear(h_t, w_hr)).to(dtype)
        hs[t], cs[t] = h_t, c_t
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
    return hs, cs, h, c


def _split(tensor: Tensor, rows: Rows) -> list[Tensor]:
    """A tensor of these rows, (N, ·) or (T, B, ·), as T tensors (n, ·) of the alive rows, sorted."""
    if rows.packed:
        assert rows.batch_sizes is not None
        return list(tensor.split(rows.batch_sizes.tolist()))
    if rows.batch_sizes is None:
        return list(tensor.unbind(0))
    if rows.order is not None:
        tensor = tensor.index_select(1, rows.order.to(tensor.device))
    return [step[:n] for step, n in zip(tensor.unbind(0), rows.batch_sizes.tolist(), strict=True)]


def _join(steps: Sequence[Tensor], rows: Rows) -> Tensor:
    """The inverse of :func:`_split`; padded positions read zero."""
    if rows.packed:
        return torch.cat(list(steps))
    tensor = torch.stack([pad(step, (0, 0, 0, rows.batch - step.shape[0])) for step in steps])
    if rows.order is not None:
        tensor = tensor.index_select(1, torch.argsort(rows.order).to(tensor.device))
    return tensor
