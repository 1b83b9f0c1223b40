"""The one place that chooses a backend, and says why.

``triton`` and ``numba`` are the fused kernels of :mod:`lstmcore.kernels`; ``torch`` hands the whole call to ATen's
LSTM, exactly as ``torch.nn.LSTM`` does; ``reference`` is the plain step loop of :mod:`lstmcore.reference`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstmcore.kernels.contract import Layer
from lstmcore.kernels.cpu import process, threads

NAMES = ("auto", "triton", "numba", "torch", "reference")
_MODULES = {
    "triton": "lstmcore.kernels.gpu.backend",
    "numba": "lstmcore.kernels.cpu.backend",
    "torch": "lstmcore.aten",
    "reference": "lstmcore.reference",
}
_DEVICES = {"triton": "cuda", "numba": "cpu"}
LONG, SOME = 1024, 32  # steps, and rows or inputs, that stand for unknown ones
OLDEST_TRITON = (3, 6)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Choice:
    """The backend that runs a call, and what was said about each one considered (name, reason), best first."""

    name: str
    reasons: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"backend {self.name!r} runs this call"]
        lines += [f"  {name:<10}{'chosen' if name == self.name else 'not used'}: {why}" for name, why in self.reasons]
        return "\n".join(lines)


def check_name(name: str) -> None:
    """ValueError unless ``name`` is one of :data:`NAMES`."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(map(repr, NAMES))}")


@functools.cache
def load(name: str) -> Any:
    """The module behind a backend's name, imported on first use (Numba alone takes a third of a second).

    Raises ImportError, which says what would help, where a package that it needs is missing, too old or switched off.
    """
    if name == "triton":
        found = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
        if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST_TRITON:
            oldest = ".".join(map(str, OLDEST_TRITON))
            raise ImportError(f"it needs Triton {oldest} or newer, found {found}; pip install triton")
    try:
        if name == "numba" and importlib.import_module("numba").config.DISABLE_JIT:
            raise ImportError("Numba's compiler is switched off; unset NUMBA_DISABLE_JIT before Python starts")
        module: ModuleType = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        raise ImportError(f"it needs a package that is missing ({error}); pip install {name}") from error
    return module


@functools.cache
def _bfloat16_hardware() -> bool:
    """Whether this CPU multiplies bfloat16 (AVX512-BF16 or AMX), which ATen's LSTM then does."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def faster_than_torch(layer: Layer, several: bool = True) -> bool:
    """Whether the Numba kernels beat ATen for this class of layer: what measurements say, as a rule.

    ``several``: they share the work out among threads.

    * Dense float32 and bfloat16: ATen calls oneDNN, which wins where a call is over in a few steps, or the layer is so
      small that nothing is left to gain; in inference of a wide layer both are level for longer.  Measured behind an
      operation of torch's for T 1 to 160, B 1, 8, 32 and H 16 to 512, on two kinds of processor: what this rule picks
      is 0.99 to 2.6 times as fast in training with two threads and 1.0 to 3.7 in inference, with one thread 1.0 to 1.6
      and 0.99 to 1.95 (AMD EPYC, Zen 3, AVX2); 0.97 to 1.9 and 1.01 to 2.5 with two threads (Intel Xeon, AVX-512).
    * What oneDNN does not cover (packed, projections, float64, float16) ATen runs step by step, at some 50
      microseconds a step; what is laid out anew for each batch of lengths costs 0.3 ms a pass.
    * bfloat16 on a CPU that multiplies it: oneDNN uses that, our kernels compute in float32; ours win while the cell
      and the overhead of a step outweigh its products.
    """
    steps, hidden, batch = layer.steps, layer.hidden_size, layer.batch
    if layer.ragged:
        return steps >= (10 if layer.training else 20)
    if layer.proj_size or layer.dtype not in (torch.float32, torch.bfloat16):
        return steps >= (4 if layer.training else 6)
    if layer.dtype == torch.bfloat16 and _bfloat16_hardware() and batch * hidden > 128:
        return False
    if layer.training and hidden >= 256:
        return steps >= (1 if hidden >= 512 else 4)
    wide = not layer.training and hidden >= 128 and not (hidden >= 512 and batch == 1)
    size = steps * hidden * min(batch, 16) ** 0.5
    return steps >= (20 if wide else 10) and size >= (700 if several else 1500)


def faster_than_cudnn(layer: Layer) -> bool:
    """Whether the Triton kernels beat cuDNN for this class of layer: what measurements on an H200 say, as a rule.

    * Where cuDNN launches kernels for each step (bfloat16, float32 of H > 192, packed, projections, an H that is no
      multiple of 128), a step takes it 13 microseconds forward and 27 backward, whatever its size up to H 1024 and 64
      rows, most of it that host's: ours are 2 to 14 times as fast there.  A call costs us 0.2 ms more in inference and
      1 to 2 ms in training, and cuDNN wins where products count: H 2048 (0.95), 256 rows of H 1024 (0.73 to 0.86);
      float32 of H 1024 is level.
    * Where it keeps one kernel running (float16, and float32 of H <= 192), ours are 1.05 to 2.8 times as fast over 1024
      steps, but for inference of 16 rows of H 768 (0.87).
    """
    steps, hidden, batch = layer.steps, layer.hidden_size, layer.batch
    if hidden > 1024 or batch > 256 or (hidden > 512 and batch > 64):
        return False
    if layer.dtype == torch.float32 and (hidden > 512 or batch > 64):
        return False
    stepwise = layer.ragged or layer.proj_size > 0 or layer.dtype == torch.bfloat16
    if not stepwise and hidden <= 192:
        return steps >= 1000
    if not stepwise and layer.dtype == torch.float16 and hidden % 128 == 0:
        return steps >= 1000 and (layer.training or batch > 16)
    return steps >= (100 if layer.training else 32)


_LOST_THREADS = (
    "in this forked child it may wait for ever for threads of torch's that the fork left behind; "
    "torch.set_num_threads(1) lets it compute here"
)


def _why_not(name: str, layers: tuple[Layer, ...], extended: bool, opaque: bool) -> str | None:
    """One sentence on why backend ``name`` cannot run these layers here, or None when it can."""
    layer = layers[0]
    if name == "torch":
        if extended:
            return "ATen's LSTM has no lengths, reset or return_cells, and nothing to record; use backend='auto'"
        return None
    if name != "reference" and opaque:
        return (
            "tensor subclasses do not enter kernels, and torch.jit's tracer does not see them; use plain tensors, or "
            "backend='torch' or 'reference'"
        )
    if layer.dtype not in _FLOATS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        return f"it computes in {names}, not in {layer.dtype}; convert the module and the input, or use backend='torch'"
    if name in _DEVICES:
        try:
            kernels = load(name)
        except ImportError as error:
            return f"it could not be loaded: {error}"
        for each in layers:
            reason = kernels.supports(each)
            if reason is not None:
                return reason
    return None


def _slower(name: str, layers: tuple[Layer, ...], several: bool) -> str | None:
    """One sentence on why ``"auto"`` leaves these layers to ATen although ``name`` could run them, or None."""
    if name == "numba" and not all(faster_than_torch(layer, several) for layer in layers):
        return "ATen was measured faster for this class of shape"
    if name == "triton" and not all(faster_than_cudnn(layer) for layer in layers):
        return "cuDNN was measured faster for this class of shape, or ours was not measured on it"
    return None


@functools.lru_cache(maxsize=4096)
def choose(
    name: str,
    layers: tuple[Layer, ...],
    extended: bool = False,
    opaque: bool = False,
    orphan: bool = False,
    several: bool = True,
) -> Choice:
    """The backend for a stack of layers.

    ``layers``: the first layer, and the others' common shape where there are more.  ``extended``: the call uses what
    ATen's LSTM does not have (lengths, reset, cells, a recording).  ``opaque``: its tensors are of a subclass,
    or torch.jit traces it.  ``orphan``: torch may wait for threads that stayed with the parent process.
    ``several``: there is more than one thread.  A named backend that cannot run them raises RuntimeError with the
    reason; ``"auto"`` always finds one.
    """
    check_name(name)
    if name != "auto":
        reason = _why_not(name, layers, extended, opaque)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run this call: {reason}")
        why = "asked for by name"
        if name == "triton":
            why += f": {load(name).describe(layers[0])}"
        return Choice(name, ((name, why),))

    reasons: list[tuple[str, str]] = []
    safe = "need none of the threads that a forked child lacks" if orphan else "are faster here than ATen"
    for candidate, why in (
        ("triton", ""),
        ("numba", f"the fused CPU kernels cover this call and {safe}"),
        ("torch", "ATen's LSTM, as torch.nn.LSTM runs it"),
        ("reference", "the plain step loop computes what no other backend does"),
    ):
        device = _DEVICES.get(candidate)
        if device not in (None, layers[0].device.type):  # known without loading a compiler
            reason = f"it runs on {device}, not on {layers[0].device}"
        else:
            reason = _why_not(candidate, layers, extended, opaque)
        if reason is None and candidate == "triton":
            kernels = load(candidate)
            if kernels.measured(layers[0].device):
                why = f"the fused GPU kernels cover this call: {kernels.describe(layers[0])}"
            else:
                reason = (
                    "its kernels have not been measured on a device of this kind yet (make gpu does that); "
                    "backend='triton' runs them"
                )
        if reason is None and candidate == "torch" and orphan and layers[0].device.type == "cpu":
            reason = _LOST_THREADS
        if reason is None and not extended and not orphan:
            reason = _slower(candidate, layers, several)
        if reason is None:
            return Choice(candidate, (*reasons, (candidate, why)))
        reasons.append((candidate, reason))
    # Only a dtype that no backend of ours computes, with an argument that ATen's LSTM does not have.
    raise RuntimeError("no backend can run this call:\n" + "\n".join(f"  {name}: {why}" for name, why in reasons))


@functools.lru_cache(maxsize=4096)
def plan(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    directions: int,
    bias: bool,
    ragged: bool,
    training: bool,
    extended: bool,
    opaque: bool,
    orphan: bool,
    several: bool,
) -> Choice:
    """:func:`choose` for a call described by plain values; cached, because it runs once a call."""

    def layer(width: int) -> Layer:
        return Layer(device, dtype, steps, batch, width, hidden_size, proj_size, directions, bias, ragged, training)

    layers: tuple[Layer, ...] = (layer(input_size),)
    if num_layers > 1:
        layers += (layer(directions * (proj_size or hidden_size)),)
    return choose(name, layers, extended, opaque, orphan, several)


def in_graph(name: str, described: Layer, extended: bool) -> str:
    """The backend of a layer in a compiled or exported graph, or under a transform: chosen once, for every T and B.

    As for a long sequence of some rows: steps and batch may be symbols there.  The hidden size becomes a constant.
    """
    return plan(
        name, described.device, described.dtype, LONG, SOME, SOME, int(described.hidden_size),
        int(described.proj_size), 1, described.directions, described.bias, described.ragged, described.training,
        extended, opaque=False, orphan=process.torch_would_hang(), several=True,
    ).name  # fmt: skip


_CELL = "ATen's fused cell: one step has no recurrence for a kernel to keep in cache"


def runs_atens_cell(name: str, device: torch.device) -> bool:
    """Whether a cell with backend ``name`` is ATen's; otherwise it is an LSTM of one step."""
    check_name(name)
    return name == "torch" or (name == "auto" and not (device.type == "cpu" and process.torch_would_hang()))


def explain(module: torch.nn.Module, input: Tensor | PackedSequence, *, extended: bool = False) -> Choice:
    """Which backend ``module(input)`` would run, and why; print it.

    Args:
        module: an :class:`lstmcore.LSTM` or ``LSTMCell``, or one of ``torch.nn`` (taken as ``backend="auto"``).
        input: what it would be called with: ``(T, B, I)``, ``(B, T, I)`` when batch_first, ``(T, I)``, or packed;
            ``(B, I)`` or ``(I,)`` of a cell.
        extended: the call would pass ``lengths``, ``reset`` or ``return_cells``, or be recorded.

    Raises:
        RuntimeError: the module names a backend that cannot run the call.
    """
    m: Any = module
    name = getattr(module, "backend", "auto")
    packed = isinstance(input, PackedSequence)
    data: Tensor = input.data if isinstance(input, PackedSequence) else input
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (data, *module.parameters()))
    if isinstance(module, torch.nn.RNNCellBase):
        if runs_atens_cell(name, data.device):
            return Choice("torch", (("torch", _CELL),))
        steps, batch, stack = 1, len(data) if data.dim() == 2 else 1, (0, 1, 1)
    else:
        if isinstance(input, PackedSequence):
            steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
        elif data.dim() == 2:
            steps, batch = data.shape[0], 1
        else:
            steps, batch = data.shape[:2] if not m.batch_first else (data.shape[1], data.shape[0])
        stack = (m.proj_size, m.num_layers, 2 if m.bidirectional else 1)
    choice = plan(
        name, data.device, data.dtype, steps, batch, m.input_size, m.hidden_size, *stack, m.bias, packed, training,
        extended, opaque=False, orphan=process.torch_would_hang(), several=threads.count() > 1,
    )  # fmt: skip
    return _with_threads(choice)


def _with_threads(choice: Choice) -> Choice:
    """``choice``, which says whose threads the CPU kernels would use: that may change from call to call."""
    if choice.name != "numba":
        return choice
    whose = "one thread" if threads.count() == 1 else f"{threads.count()} threads, {threads.describe()}"
    reasons = tuple((name, f"{why} ({whose})" if name == "numba" else why) for name, why in choice.reasons)
    return Choice(choice.name, reasons)
