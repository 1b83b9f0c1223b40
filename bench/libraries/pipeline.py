"""What a library is here: a pipeline that trains, with torch's LSTM or moved over, and all that is seen of a run of it.

A run is seen from outside, through torch's global hooks, since many libraries keep their loop, their model and their
optimizer to themselves: the gradients as each optimizer step finds them, whether the kernels ran, and whether a module
of torch's own class did.  So nobody compares torch with torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import lstmcore
from lstmcore import backends, direct

SEED = 20
KERNELS = "numba"


@dataclass(frozen=True)
class Job:
    """A model ready to be trained; its data is drawn, its LSTM moved over or not."""

    train: Callable[[], Sequence[float]]  # what a user waits for, with some optimizer steps in it; returns losses
    outputs: Callable[[], Tensor]  # of the model in evaluation, on the same data at each call


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """One way to train an LSTM with a library.

    ``build(small, moved)`` makes a job, from the random state that it finds: of a size for a comparison, or of one
    that people train; with torch's LSTM, or moved over by the very code in ``how``.
    """

    name: str  # unique; the library's name first
    distribution: str  # what pip calls the library
    how: str  # what it takes to move over, as code
    timed: str  # what ``train`` is, at the size that people train
    build: Callable[[bool, bool], Job]
    stock: type[nn.Module] = nn.LSTM  # what the library runs where nothing is moved over
    float64: bool = True  # whether it can be built in float64 too, as torch's default dtype


@dataclass
class Trace:
    """What is seen of a run."""

    losses: list[float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)  # before training, and after
    gradients: list[list[Tensor | None]] = field(default_factory=list)  # of each optimizer step, parameter by parameter
    kernels: int = 0  # calls that our kernels ran
    stock: int = 0  # calls of the library's LSTM where it was not moved over


def seed() -> None:
    """Every generator that a library may draw from."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


class Nudge:
    """Changes each parameter by up to half an eps of itself, at random, when its module is first called.

    That is what rounding the weights would do: how far such a run goes astray shows how well its figures are known.
    """

    def __init__(self, number: int) -> None:
        self._generator, self._done = torch.Generator().manual_seed(number), set[int]()

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        for parameter in module.parameters():
            if id(parameter) not in self._done and parameter.is_floating_point():
                self._done.add(id(parameter))
                half = torch.finfo(parameter.dtype).eps / 2
                noise = torch.empty_like(parameter, device="cpu").uniform_(-half, half, generator=self._generator)
                parameter.mul_(1 + noise.to(parameter.device))


@contextmanager
def watched(stock: type[nn.Module], nudge: Nudge | None = None) -> Iterator[Trace]:
    """What happens inside is seen in the trace; with a nudge, to parameters that are slightly different."""
    trace = Trace()

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        given = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        trace.gradients.append([None if grad is None else grad.detach().clone() for grad in given])

    def before_forward(module: nn.Module, *_: Any) -> None:
        trace.stock += isinstance(module, stock) and not isinstance(module, lstmcore.LSTM)
        if nudge is not None:
            nudge(module)

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            trace.kernels += 1
            return run(*args, **kwargs)

        return forward

    kernels = backends.load(KERNELS)
    with ExitStack() as stack:
        for name in ("forward", "forward_stack"):
            stack.enter_context(mock.patch.object(kernels, name, counted(getattr(kernels, name))))
        stack.callback(register_optimizer_step_pre_hook(before_step).remove)
        stack.callback(register_module_forward_pre_hook(before_forward).remove)
        yield trace


@contextmanager
def whatever_is_faster() -> Iterator[None]:
    """The kernels run all that they cover: "auto" would leave small jobs to ATen, and they are what is compared."""

    def forget() -> None:
        backends.forget()
        direct.forget()

    eager = replace(backends.REGISTRY[KERNELS], faster=lambda layer, situation: backends.Verdict(True))
    forget()
    try:
        with mock.patch.dict(backends.REGISTRY, {KERNELS: eager}):
            yield
    finally:
        forget()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(
    pipeline: Pipeline, *, moved: bool, nudge: int | None = None, dtype: torch.dtype = torch.float32, times: int = 2
) -> Trace:
    """The small job of a pipeline from the one seed: outputs, so many times ``train``, outputs again."""
    seed()
    with default_dtype(dtype), whatever_is_faster():
        job = pipeline.build(True, moved)
        with watched(pipeline.stock, None if nudge is None else Nudge(nudge)) as trace:
            trace.outputs.append(job.outputs().detach().clone())
            for _ in range(times):
                trace.losses += map(float, job.train())
            trace.outputs.append(job.outputs().detach().clone())
    return trace
