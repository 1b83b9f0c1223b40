"""The one place that chooses a backend, and says why.  It uses the registry's entries, and knows none by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, ParamSpec

import torch

from lstmcore.backends import self_check, tuning
from lstmcore.backends.registry import AUTO, REGISTRY, Backend, check_name, load
from lstmcore.backends.situation import Situation
from lstmcore.backends.timings import Verdict
from lstmcore.kernels.contract import Layer
from lstmcore.kernels.cpu import process, threads

_Asked = ParamSpec("_Asked")
CHECKED = "checked here against the reference"
LONG, SOME = 1024, 32  # steps, and rows or inputs, assumed for unknown ones
_LOST_THREADS = (
    "in this forked child it may wait forever for threads of torch's that the fork left behind; "
    "torch.set_num_threads(1) lets it compute here"
)


@dataclass(frozen=True)
class Choice:
    """The backend that runs a call, and why each one considered does or does not, (name, why), best first."""

    name: str
    considered: tuple[tuple[str, str], ...]
    layer: Layer | None = None  # the first, for how the backend would run it now
    threads: str = ""

    @property
    def reasons(self) -> tuple[tuple[str, str], ...]:
        """``considered``, with how the backend would run the first layer now, if it says so."""
        describe = None if self.layer is None else getattr(load(self.name), "describe", None)
        how = "" if describe is None else f": {describe(self.layer)}"
        return tuple((name, f"{why}{how}{self.threads}" if name == self.name else why) for name, why in self.considered)

    def __str__(self) -> str:
        lines = [f"backend {self.name!r} runs this call"]
        lines += [f"  {name:<10}{'chosen' if name == self.name else 'not used'}: {why}" for name, why in self.reasons]
        return "\n".join(lines)

    def with_threads(self) -> Choice:
        """The same, with the threads that a backend of the CPU would use, which may change from call to call."""
        backend = REGISTRY[self.name]
        if backend.device != "cpu":
            return self
        whose = "one thread" if threads.count() == 1 else f"{threads.count()} threads, {threads.describe()}"
        return replace(self, threads=f" ({whose})")


def _why_not(backend: Backend, layers: tuple[Layer, ...], situation: Situation) -> str | None:
    """One sentence on why a backend cannot run these layers here, or None if it can."""
    dtype = layers[0].dtype
    if situation.extended and not backend.extended:
        return "it has no lengths, reset, return_cells or recompute, and nothing to record; use backend='auto'"
    if situation.opaque and backend.fused:
        return (
            "tensor subclasses do not enter kernels, and torch.jit's tracer does not see them; use plain tensors, or "
            "backend='torch' or 'reference'"
        )
    if backend.dtypes is not None and dtype not in backend.dtypes:
        names = ", ".join(str(each).removeprefix("torch.") for each in backend.dtypes)
        return f"it computes in {names}, not in {dtype}; convert the module and the input, or use backend='torch'"
    try:
        module = load(backend.name)
    except ImportError as error:
        return f"it could not be loaded: {error}"
    return next((reason for layer in layers if (reason := module.supports(layer)) is not None), None)


def _judged(backend: Backend, layers: tuple[Layer, ...], situation: Situation) -> Verdict:
    """Whether ``"auto"`` takes a backend for these layers, and why; no reason: nothing spoke against it.

    Raises ``self_check.Undecided`` if that cannot be known now.
    """
    device = layers[0].device
    if backend.device not in (None, device.type):  # known without loading a compiler
        return Verdict(False, f"it runs on {backend.device}, not on {device}")
    if (reason := _why_not(backend, layers, situation)) is not None:
        return Verdict(False, reason)
    if situation.orphan and backend.torch_threads and device.type == "cpu":
        return Verdict(False, _LOST_THREADS)
    verdict = Verdict(True)
    if not (situation.extended or situation.orphan):  # else none of the faster ones would run it
        verdicts = [backend.faster(layer, situation) for layer in layers]
        verdict = next((each for each in verdicts if not each.faster), verdicts[0])
    if verdict.faster and backend.checked:
        refusals = (self_check.refusal(backend.name, layer, situation.extended) for layer in layers)
        if (reason := next(filter(None, refusals), None)) is not None:
            return Verdict(False, reason)
    return verdict


class _ForNow(Exception):
    """A choice for one call, because something about a better one cannot be known now; nobody remembers it."""

    def __init__(self, choice: Choice) -> None:
        super().__init__(str(choice))
        self.choice = choice


class _Remembered(Generic[_Asked]):
    """``functools.lru_cache`` for a function that chooses, except for a choice that is for now."""

    def __init__(self, function: Callable[_Asked, Choice]) -> None:
        self.ask: Callable[..., Choice] = functools.lru_cache(maxsize=4096)(function)  # raises _ForNow
        self.cache_clear: Callable[[], None] = self.ask.cache_clear
        functools.update_wrapper(self, function)

    def __call__(self, *args: _Asked.args, **kwargs: _Asked.kwargs) -> Choice:
        try:
            return self.ask(*args, **kwargs)
        except _ForNow as passing:
            return passing.choice


@_Remembered
def choose(name: str, layers: tuple[Layer, ...], situation: Situation = Situation()) -> Choice:  # noqa: B008 (immutable)
    """The backend for a stack of layers: the first one, and the common sizes of the others if there are more.

    A named backend that cannot run them raises RuntimeError with the reason; ``"auto"`` always finds one.
    """
    check_name(name)
    if name != AUTO:
        backend = REGISTRY[name]
        reason = _why_not(backend, layers, situation)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
        return Choice(name, ((name, "asked for by name"),), layers[0])

    reasons: list[tuple[str, str]] = []
    for_now = False
    for candidate, backend in REGISTRY.items():
        try:
            verdict = _judged(backend, layers, situation)
        except self_check.Undecided as undecided:
            verdict, for_now = Verdict(False, str(undecided)), True
        if not verdict.faster:
            reasons.append((candidate, verdict.why))
            continue
        why = f"{backend.why} ({verdict.why})" if verdict.why else backend.why
        why += " without the threads that a forked child lacks" if situation.orphan else ""
        why += f", {CHECKED}" if backend.checked else ""
        choice = Choice(candidate, (*reasons, (candidate, why)), layers[0])
        if for_now:
            raise _ForNow(choice)
        return choice
    # Only for a dtype that none of our backends computes, with an argument that ATen's LSTM does not have.
    raise RuntimeError("no backend can run this call:\n" + "\n".join(f"  {name}: {why}" for name, why in reasons))


@_Remembered
def chosen(name: str, layer: Layer, num_layers: int, situation: Situation) -> Choice:
    """:func:`choose` for a stack that begins with ``layer``; cached, because every call uses it."""
    return choose.ask(name, (layer,) if num_layers == 1 else (layer, layer.after()), situation)


def forget() -> None:
    """Chooses anew from now on, by tables that are read anew.

    Graphs that were compiled before have to be compiled again: their saved tensors are those of the old choice.
    """
    tuning.forget()
    for function in (choose, chosen, _in_graph, runs_in_graph):
        function.cache_clear()


def in_graph(name: str, layer: Layer, extended: bool) -> str:
    """The backend of a layer in a compiled or exported graph, or under a transform: chosen once, for every T and B.

    As for a long sequence of some rows, because steps and batch may be symbols.  The hidden size becomes a constant.
    It depends on no setting that may change between forward and backward: the number of threads, and TF32.
    """
    fixed = layer._replace(
        steps=LONG, batch=SOME, input_size=SOME, hidden_size=int(layer.hidden_size), proj_size=int(layer.proj_size)
    )
    return _in_graph(name, fixed, Situation(extended, orphan=process.torch_would_hang()))


@functools.lru_cache(maxsize=4096)
def _in_graph(name: str, layer: Layer, situation: Situation) -> str:
    """Remembered even if it is for now: forward and backward of a graph have to agree."""
    return chosen(name, layer, 1, situation).name


@functools.lru_cache(maxsize=4096)
def runs_in_graph(asked: str, name: str, layer: Layer, extended: bool) -> bool:
    """Whether backend ``name``, which :func:`in_graph` returned, runs a call of such a layer, whose B is known now.

    Not if it does not support the layer, or if ``asked`` was "auto" and the kernels for this B fail their check, or
    cannot be checked; remembered for a whole graph, like :func:`in_graph`.
    """
    if load(name).supports(layer) is not None:
        return False
    if asked != AUTO or not REGISTRY[name].checked:
        return True
    try:
        return self_check.refusal(name, layer, extended) is None
    except self_check.Undecided:
        return False


def own_cell(name: str, device: torch.device) -> str | None:
    """The backend whose own single step a cell runs; None if it runs an LSTM of one step."""
    check_name(name)
    orphan = device.type == "cpu" and process.torch_would_hang()
    for candidate, backend in REGISTRY.items():
        if backend.cell and (name == candidate or (name == AUTO and not (orphan and backend.torch_threads))):
            return candidate
    return None
