"""The named grid of configurations, and how the data of one is drawn.

T time, B batch, I input, H hidden, P projection (H where there is none), L layers, D directions, N packed rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstmcore

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Case:
    """One configuration of an LSTM and of what is fed to it."""

    name: str
    T: int = 4
    B: int = 3
    I: int = 5
    H: int = 8
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    bidirectional: bool = False
    proj_size: int = 0
    hx: bool = True
    lengths: tuple[int, ...] | None = None  # packed when given (B and T follow); unsorted unless already sorted
    unbatched: bool = False
    strided: str = ""  # "", "transposed", "sliced" (every other feature), "expanded" (stride 0 over the batch)
    scale: float = 1.0  # of the input: large ones saturate the gates
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lengths is not None:
            object.__setattr__(self, "T", max(self.lengths))
            object.__setattr__(self, "B", len(self.lengths))
        if self.unbatched:
            object.__setattr__(self, "B", 1)

    def __str__(self) -> str:
        return self.name

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def P(self) -> int:
        return self.proj_size or self.H

    def arguments(self) -> dict:
        """What the constructors of both LSTMs take."""
        return {
            "input_size": self.I,
            "hidden_size": self.H,
            "num_layers": self.num_layers,
            "bias": self.bias,
            "batch_first": self.batch_first,
            "bidirectional": self.bidirectional,
            "proj_size": self.proj_size,
        }


CASES = [
    # sizes: ones, vector widths and their neighbours, more rows than a block, more steps than a chunk
    Case("ones", T=1, B=1, I=1, H=1),
    Case("one_step", T=1, B=4, I=3, H=5),
    Case("one_row", T=9, B=1, I=5, H=17),
    Case("one_input", T=11, B=3, I=1, H=16),
    Case("one_unit", T=12, B=5, I=4, H=1),
    Case("h7", T=6, B=2, I=9, H=7),
    Case("h15", T=5, B=7, I=15, H=15),
    Case("h16", T=5, B=6, I=16, H=16),
    Case("h17", T=5, B=12, I=17, H=17),
    Case("h31", T=3, B=13, I=2, H=31),
    Case("h33", T=4, B=5, I=31, H=33),
    Case("h64", T=4, B=6, I=32, H=64),
    Case("h129", T=3, B=5, I=2, H=129),
    Case("i129", T=3, B=2, I=129, H=8),
    Case("b33", T=5, B=33, I=7, H=17),
    Case("b65", T=2, B=65, I=3, H=9),
    Case("long", T=130, B=2, I=3, H=4),
    Case("longer", T=700, B=1, I=2, H=3),
    # options
    Case("no_bias", T=5, B=4, I=3, H=18, bias=False),
    Case("no_hx", T=5, B=4, I=3, H=18, hx=False),
    Case("batch_first", T=6, B=4, I=5, H=10, batch_first=True),
    Case("bidirectional", T=7, B=3, I=6, H=17, bidirectional=True),
    Case("bidirectional_one_row", T=8, B=1, I=2, H=20, bidirectional=True, batch_first=True),
    Case("proj", T=6, B=4, I=5, H=19, proj_size=7),
    Case("proj_one", T=4, B=3, I=2, H=9, proj_size=1, bias=False),
    Case("proj_bidirectional", T=5, B=7, I=3, H=17, proj_size=16, bidirectional=True),
    Case("layers", T=5, B=5, I=7, H=12, num_layers=3),
    Case("layers_bidirectional", T=4, B=3, I=5, H=9, num_layers=4, bidirectional=True, batch_first=True, hx=False),
    Case("everything", T=5, B=7, I=3, H=11, num_layers=2, bidirectional=True, proj_size=5, batch_first=True),
    Case("saturated", T=9, B=3, I=4, H=17, scale=60.0),
    # how the tensors lie
    Case("unbatched", T=7, I=4, H=17, unbatched=True),
    Case("unbatched_all", T=5, I=4, H=9, num_layers=2, bidirectional=True, proj_size=4, unbatched=True, hx=False),
    Case("unbatched_batch_first", T=5, I=4, H=9, batch_first=True, unbatched=True),
    Case("transposed", T=6, B=5, I=4, H=17, strided="transposed"),
    Case("transposed_batch_first", T=6, B=5, I=4, H=17, strided="transposed", batch_first=True),
    Case("sliced", T=6, B=5, I=17, H=17, strided="sliced"),
    Case("expanded", T=6, B=5, I=4, H=17, strided="expanded"),
    # ragged
    Case("packed", I=4, H=17, lengths=(9, 6, 6, 2, 1)),
    Case("packed_unsorted", I=5, H=12, lengths=(3, 8, 1, 8, 5)),
    Case("packed_equal", I=3, H=16, lengths=(5, 5, 5)),
    Case("packed_one_row", I=3, H=18, lengths=(7,), hx=False),
    Case("packed_one_step", I=3, H=18, lengths=(1, 1, 1)),
    Case("packed_b33", I=2, H=7, lengths=tuple(1 + 5 * r % 13 for r in range(33))),
    Case("packed_long", I=2, H=5, lengths=(3, 150, 70)),
    Case("packed_bidirectional", I=6, H=17, lengths=(2, 7, 4, 7), bidirectional=True),
    Case("packed_proj", I=6, H=18, lengths=(5, 4, 1), proj_size=7, bias=False),
    Case("packed_sliced", I=9, H=16, lengths=(5, 4, 1), strided="sliced"),
    Case("packed_everything", I=4, H=10, lengths=(1, 6, 3, 4, 6, 2, 5), num_layers=2, bidirectional=True, proj_size=3),
    Case("packed_batch_first", I=4, H=10, lengths=(4, 6), num_layers=2, batch_first=True, hx=False),
]
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "two cases share a name"


@dataclass
class Data:
    """What one case is fed with and judged by: all float64, rounded to the dtype under test."""

    input: Tensor  # (T, B, I), (B, T, I), (T, I) or packed (N, I)
    batch_sizes: Tensor | None
    sorted_indices: Tensor | None
    unsorted_indices: Tensor | None
    hx: tuple[Tensor, Tensor] | None  # (L * D, B, P), (L * D, B, H), or without B
    state_dict: dict[str, Tensor]
    seeds: tuple[Tensor, Tensor, Tensor]  # the gradients of output, h_n, c_n


def draw(case: Case, dtype: torch.dtype) -> Data:
    """The data of ``case``: values that ``dtype`` represents exactly, as float64."""
    g = torch.Generator().manual_seed(1000 + case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).double()

    module = nn.LSTM(**case.arguments(), dtype=torch.float64)
    bound = case.H**-0.5
    state_dict = {
        name: (torch.empty(value.shape, dtype=torch.float64).uniform_(-bound, bound, generator=g)).to(dtype).double()
        for name, value in module.state_dict().items()
    }
    x = (normal(case.T, case.B, case.I) * case.scale).to(dtype).double()
    if case.strided == "expanded":
        x = x[:, :1].expand(-1, case.B, -1)
    states = [normal(case.num_layers * case.D, case.B, width) for width in (case.P, case.H)]
    seeds = [normal(case.T, case.B, case.D * case.P), *(normal(*s.shape) for s in states)]
    packed = None
    if case.lengths is not None:
        lengths = torch.tensor(case.lengths)
        is_sorted = bool((lengths[1:] <= lengths[:-1]).all())
        packed = pack_padded_sequence(x, lengths, enforce_sorted=is_sorted)
        x = packed.data
        seeds[0] = pack_padded_sequence(seeds[0], lengths, enforce_sorted=is_sorted).data
    elif case.batch_first:
        x, seeds[0] = x.transpose(0, 1), seeds[0].transpose(0, 1)
    if case.unbatched:
        dim = 0 if case.batch_first else 1
        x, seeds[0] = x.squeeze(dim), seeds[0].squeeze(dim)
        states, seeds[1:] = [s.squeeze(1) for s in states], [s.squeeze(1) for s in seeds[1:]]
    return Data(
        x,
        *((packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices) if packed else (None, None, None)),
        tuple(states) if case.hx else None,
        state_dict,
        tuple(seeds),
    )


def lay_out(x: Tensor, strided: str) -> Tensor:
    """A fresh tensor of the values of ``x`` with the memory layout that a case names."""
    if strided == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if strided == "sliced":
        return torch.stack([x, torch.full_like(x, 1e4)], -1).flatten(-2)[..., ::2]
    if strided == "expanded":
        return x[:, :1].clone().expand_as(x)
    return x.contiguous().clone()


def build(case: Case, data: Data, dtype: torch.dtype, backend: str | None, device: str = "cpu") -> nn.Module:
    """The module of a case with its weights; torch's own where ``backend`` is None."""
    make = nn.LSTM if backend is None else lambda **kwargs: lstmcore.LSTM(**kwargs, backend=backend)
    module = make(**case.arguments(), dtype=dtype, device=device)
    module.load_state_dict(data.state_dict)
    return module


def run(
    case: Case, data: Data, dtype: torch.dtype, backend: str | None, *, grad: bool = True, device: str = "cpu"
) -> dict[str, Tensor]:
    """Every result of a case by name, as float64: outputs, and the gradients of input, states and parameters."""
    module = build(case, data, dtype, backend, device)
    x = lay_out(data.input.to(device, dtype), case.strided).requires_grad_(grad)
    hx = tuple(s.to(device, dtype).requires_grad_(grad) for s in data.hx) if data.hx is not None else None
    fed = x
    if data.batch_sizes is not None:
        indices = (i if i is None else i.to(device) for i in (data.sorted_indices, data.unsorted_indices))
        fed = PackedSequence(x, data.batch_sizes, *indices)
    with torch.set_grad_enabled(grad):
        output, (h_n, c_n) = module(fed, hx)
    if isinstance(output, PackedSequence):
        assert torch.equal(output.batch_sizes, data.batch_sizes)
        output = output.data
    results = {"output": output, "h_n": h_n, "c_n": c_n}
    assert all(r.dtype == dtype for r in results.values()), {k: r.dtype for k, r in results.items()}
    if grad:
        seeds = [s.to(device, dtype) for s in data.seeds]
        if case.strided:
            seeds[0] = lay_out(seeds[0], case.strided if case.strided != "expanded" else "sliced")
        wanted = {"input": x, **dict(zip(("h_0", "c_0"), hx or (), strict=False)), **dict(module.named_parameters())}
        grads = torch.autograd.grad((output, h_n, c_n), list(wanted.values()), seeds)
        results |= {f"grad of {name}": g for name, g in zip(wanted, grads, strict=True)}
    return {name: value.detach().cpu().double() for name, value in results.items()}
