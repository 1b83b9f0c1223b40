"""The oracles: float64 ``torch.nn.LSTM``, and one layer written row by row for what torch does not do.

Neither shares a line with the library.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .cases import Case, draw, run
from .tolerances import bound, error, term_of


@lru_cache(maxsize=512)
def conditioning(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """What rounding the data of ``case`` would do to each exact result, in the dtype in which ``dtype`` computes.

    That is the largest change in a tensor where all that is given changes by up to half an eps, at random.
    """
    data, generator = draw(case, dtype), torch.Generator().manual_seed(7)
    half = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2

    def rounded(value: Tensor) -> Tensor:
        return value * (1 + half * torch.empty_like(value).uniform_(-1, 1, generator=generator))

    exact, largest = run(case, data, torch.float64, None), {}
    for _ in range(5):
        changed = replace(
            data,
            input=rounded(data.input),
            hx=data.hx and tuple(map(rounded, data.hx)),
            state_dict={name: rounded(value) for name, value in data.state_dict.items()},
        )
        for name, value in run(case, changed, torch.float64, None).items():
            largest[name] = max(largest.get(name, 0.0), error(value, exact[name]))
    return largest


@lru_cache(maxsize=512)
def judge(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The results of float64 nn.LSTM on the data of ``case``, and the errors of nn.LSTM in ``dtype`` against them."""
    oracle = run(case, draw(case, dtype), torch.float64, None)
    if dtype == torch.float64:  # see tolerances.FLOORS: from float32, and half as much again for the oracle's own
        _, errors = judge(case, torch.float32)
        ratio = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        return oracle, {name: value * ratio for name, value in errors.items()}
    peer = run(case, draw(case, dtype), dtype, None)
    return oracle, {name: error(peer[name], value) for name, value in oracle.items()}


def assert_parity(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """Outputs and every gradient of ``case`` are within the bounds of ``tolerances`` of the oracle's."""
    expected, peer_errors = judge(case, dtype)
    got = run(case, draw(case, dtype), dtype, backend, device=device)
    assert got.keys() == expected.keys()
    wrong = []
    for name, value in expected.items():
        term = term_of(name, case.scale, case.T, case.B)
        allowed = bound(dtype, value, peer_errors[name], term=term, rounding=conditioning(case, dtype)[name])
        off = error(got[name], value)
        if not off <= allowed:
            shapes = f"{tuple(got[name].shape)}, expected {tuple(value.shape)}"
            wrong.append(f"{name} {shapes}: error {off:.3g}, allowed {allowed:.3g}, torch's {peer_errors[name]:.3g}")
    assert not wrong, "\n".join([f"{case!r} in {dtype} by {backend}:", *wrong])


class RowByRow:
    """One layer, one row after the other, one step after the other, in the textbook's terms.

    Takes padded (T, B, I) float64 ``x``, ``h_0`` (D, B, P), ``c_0`` (D, B, H), per direction a dict of parameters,
    lengths (B,) and resets (T, B).  Padded positions of ``output`` (T, B, D * P) and ``cells`` (T, B, D * H) are zero.
    ``norms`` (2, D, T, B), after a backward: those of the gradients of every h_t and c_t.
    """

    def __init__(self, x, h_0, c_0, weights: list[dict[str, Tensor | None]], lengths=None, reset=None) -> None:
        T, B = x.shape[:2]
        D = len(weights)
        lengths = [T] * B if lengths is None else [int(n) for n in lengths]
        outputs: dict[tuple[int, int, int], Tensor] = {}  # by direction, step, row
        self.states: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self.gates: dict[tuple[int, int, int], Tensor] = {}  # (4, H): i, f, g, o
        h_n, c_n = {}, {}
        for d, w in enumerate(weights):
            for b in range(B):
                h, c = h_0[d, b], c_0[d, b]
                steps = range(lengths[b])
                for t in reversed(steps) if d else steps:
                    if reset is not None and reset[t, b]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    h, c, self.gates[d, t, b] = self.step(x[t, b], h, c, **w)
                    for state in (h, c):
                        if state.requires_grad:
                            state.retain_grad()
                    self.states[d, t, b] = h, c
                h_n[d, b], c_n[d, b] = h, c
        empty_h, empty_c = torch.zeros_like(h_0[0, 0]), torch.zeros_like(c_0[0, 0])
        outputs = {
            (t, b): [self.states.get((d, t, b), (empty_h, empty_c)) for d in range(D)]
            for t in range(T)
            for b in range(B)
        }

        def padded(which: int) -> Tensor:
            return torch.stack(
                [torch.stack([torch.cat([s[which] for s in outputs[t, b]]) for b in range(B)]) for t in range(T)]
            )

        self.output, self.cells = padded(0), padded(1)
        self.h_n = torch.stack([torch.stack([h_n[d, b] for b in range(B)]) for d in range(D)])
        self.c_n = torch.stack([torch.stack([c_n[d, b] for b in range(B)]) for d in range(D)])
        self.shape = (2, D, T, B)

    @staticmethod
    def step(x, h, c, weight_ih, weight_hh, bias_ih=None, bias_hh=None, weight_hr=None) -> tuple[Tensor, ...]:
        z = weight_ih @ x + weight_hh @ h
        if bias_ih is not None:
            z = z + bias_ih + bias_hh
        i, f, g, o = z.chunk(4)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c = f * c + i * g
        h = o * torch.tanh(c)
        return (h if weight_hr is None else weight_hr @ h), c, torch.stack([i, f, g, o]).detach()

    @property
    def norms(self) -> Tensor:
        norms = torch.zeros(self.shape, dtype=torch.float64)
        for (d, t, b), states in self.states.items():
            for which, state in enumerate(states):
                if state.grad is not None:
                    norms[which, d, t, b] = state.grad.norm()
        return norms
