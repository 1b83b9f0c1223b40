"""Who computes a case: ``lstmcore.LSTM`` and ``torch.nn.LSTM``, on the same weights, inputs and gradients.

Legend: T steps, B batch, I input, N rows over all steps, S layers times directions, P projection, H hidden.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import lstmcore
from bench import cudnn, machine
from bench.cases import Case

OURS, PEER = "lstmcore", "torch"
PROVIDERS = (OURS, PEER)
# Which path torch takes is a column of the rows.
warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
# Torch does not lay bfloat16 weights out for cuDNN, so it copies them in each call and says so in each.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
LONG_ENOUGH = 16_384  # steps: a backend that is chosen for so many is chosen for more
OUTPUTS = ("output", "h_n", "c_n")


@dataclass(frozen=True)
class Problem:
    """The data of a case, drawn from its name: every provider, in every process, gets the same."""

    case: Case
    weights: dict[str, Tensor]
    input: Tensor  # (T, B, I)
    lengths: Tensor | None  # (B,), where the input gets packed
    hx: tuple[Tensor, Tensor]  # (S, B, P), (S, B, H)
    grad_outputs: tuple[Tensor, Tensor, Tensor]  # of output, (T, B, D * P) or (N, D * P) packed; of h_n; of c_n


def arguments(case: Case) -> dict[str, Any]:
    """What the constructors of both modules take."""
    names = ("input_size", "hidden_size", "num_layers", "bidirectional", "proj_size")
    return {name: getattr(case, name) for name in names}


def draw(case: Case, dtype: torch.dtype | None = None, steps: int | None = None) -> Problem:
    """The data of ``case``; drawn in its own dtype, then converted to ``dtype`` when given.

    ``steps`` keeps only so many (rows that are longer end there).
    """
    width = case.proj_size or case.hidden_size
    states = case.num_layers * case.directions
    lengths = [min(length, steps or length) for length in case.lengths()]
    rows = (sum(lengths),) if case.ragged else (max(lengths), case.batch)

    # On a GPU the data is drawn there: it may be gigabytes.
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if case.device == "cuda" else []):
        torch.manual_seed(zlib.crc32(case.name.encode()))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=case.device).to(case.torch_dtype).to(dtype or case.torch_dtype)

        weights = nn.LSTM(**arguments(case), device=case.device).to(case.torch_dtype).to(dtype or case.torch_dtype)
        problem = Problem(
            case=case,
            weights=weights.state_dict(),
            input=normal(max(lengths), case.batch, case.input_size),
            lengths=torch.tensor(lengths) if case.ragged else None,
            hx=(normal(states, case.batch, width), normal(states, case.batch, case.hidden_size)),
            grad_outputs=(
                normal(*rows, case.directions * width),
                normal(states, case.batch, width),
                normal(states, case.batch, case.hidden_size),
            ),
        )
    if case.loss == "last":
        output, *ends = problem.grad_outputs
        for unread in (output[:-1], *ends):
            unread.zero_()
    return problem


class Runner:
    """One module on one problem: the two things that get timed, and the names of what they return."""

    def __init__(self, module: nn.RNNBase, problem: Problem) -> None:
        module.load_state_dict(problem.weights)
        self.module = module
        self.problem = problem
        self.input = problem.input.clone().requires_grad_()
        self.hx = (problem.hx[0].clone().requires_grad_(), problem.hx[1].clone().requires_grad_())
        self.leaves = (self.input, *self.hx, *module.parameters())

    @property
    def gradient_names(self) -> tuple[str, ...]:
        return ("grad input", "grad h_0", "grad c_0", *(f"grad {name}" for name, _ in self.module.named_parameters()))

    def feed(self) -> Tensor | PackedSequence:
        """The input as the module takes it; packing is part of what is timed, for it is part of what a user runs."""
        if self.problem.lengths is None:
            return self.input
        return pack_padded_sequence(self.input, self.problem.lengths, enforce_sorted=False)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs: of all rows, then the final states."""
        output, (h_n, c_n) = self.module(self.feed(), self.hx)
        return (output.data if isinstance(output, PackedSequence) else output), h_n, c_n

    def inference(self) -> tuple[Tensor, ...]:
        """The outputs, with nothing kept for a backward: cuDNN keeps it whenever a module is in training mode."""
        if self.module.training:
            self.module.eval()
        with torch.no_grad():
            return self.forward()

    def training(self) -> tuple[Tensor, ...]:
        """The outputs, then the gradients of the input, of both initial states and of every parameter."""
        if not self.module.training:
            self.module.train()
        outputs = self.forward()
        return *outputs, *torch.autograd.grad(outputs, self.leaves, self.problem.grad_outputs)


def build(provider: str, problem: Problem, backend: str = "auto", options: Mapping[str, Any] | None = None) -> Runner:
    """The module of a provider on this problem; ``backend`` and ``options`` are for the constructor of ours."""
    settings = arguments(problem.case) | {"device": problem.input.device, "dtype": problem.input.dtype}
    if provider == PEER:
        return Runner(nn.LSTM(**settings), problem)
    if provider == OURS:
        return Runner(lstmcore.LSTM(**settings, **(options or {}), backend=backend), problem)
    raise ValueError(f"expected a provider out of {', '.join(PROVIDERS)}, got {provider!r}")


@contextmanager
def precision(case: Case) -> Iterator[None]:
    """The products of float32 as the case wants them, for both providers: both follow torch's setting."""
    settings: Any = torch.backends.cudnn.rnn
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if case.tf32 else "ieee" if case.strict else before
    try:
        yield
    finally:
        settings.fp32_precision = before


class _Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def algorithm(
    provider: str, case: Case, mode: str, backend: str = "auto", options: Mapping[str, Any] | None = None
) -> str:
    """What runs inside a provider: the backend of ours, or which of its own paths torch takes.

    Torch decides by dtype, sizes, mode and whether rows end at different steps, but not by the number of steps: two of
    them are enough to see it, except where the rows have to stay ragged.
    """
    enough = 2 if provider == PEER and not case.ragged else LONG_ENOUGH
    runner = build(provider, draw(case, steps=min(case.steps, enough)), backend, options)
    if provider == OURS:
        with torch.set_grad_enabled(mode == "training"):
            choice = lstmcore.explain(runner.module, runner.feed())
        # The GPU kernels say in their own words how they split the case: "triton (split, 64 slices x 2 groups)".
        design = dict(choice.reasons)[choice.name].partition(": ")[2]
        return f"{choice.name} ({design})" if choice.name == "triton" and design else choice.name
    with _Operators() as seen:
        getattr(runner, mode)()
    if "aten::mkldnn_rnn_layer" in seen.names:
        return "oneDNN"
    if "aten::_cudnn_rnn" in seen.names:
        gpu = machine.gpu()
        return f"cuDNN {cudnn.label(case, mode, (gpu.major, gpu.minor), gpu.multi_processor_count)}"
    return "step loop"
