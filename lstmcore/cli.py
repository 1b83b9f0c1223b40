"""The command line, ``python -m lstmcore``: ``info``, ``prewarm``, ``check`` and ``flow``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import lstmcore
from lstmcore import backends, stream
from lstmcore.kernels.contract import Layer
from lstmcore.tables import table

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
GPU_SMS = 132  # of an H100 or H200
GPU_SHAPES = (
    (32, 64),
    (128, 1),
    (128, 64),
    (129, 5),
    (256, 16),
    (512, 64),
    (768, 16),
    (1024, 16),
    (1024, 256),
    (2048, 16),
)
FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512vnni",
    "avx512bf16",
    "avx512fp16",
    "amx-bf16",
    "neon",
    "bf16",
    "sve",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a failed check, 2 for an error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    end = 1 if argv[:1] == ["flow"] else len(argv)  # the demonstration parses the rest
    arguments = _parser().parse_args(argv[:end], argparse.Namespace(rest=argv[end:]))
    try:
        return arguments.command(arguments)
    except (RuntimeError, ValueError, ImportError) as error:
        print(f"lstmcore {arguments.name}: {error}", file=sys.stderr)
        return 2


def info(arguments: argparse.Namespace) -> int:
    """Versions, machine, threads, cache, and which backend would run what."""
    from llvmlite import binding

    from lstmcore.kernels.cpu import jit, threads, tiling

    isa = tiling.cpu_isa()
    host = binding.get_host_cpu_features()
    place = jit.cache_directory()
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else []
    parent = next(path for path in (place, *place.parents) if path.exists())
    size = sum(path.stat().st_size for path in files) / 1e6
    writable = "" if os.access(parent, os.W_OK) else "; not writable: kernels compile again in every process"
    float32 = tiling.block_shape(isa, torch.float32)
    print(
        table(
            ("what", "value"),
            [
                ("lstmcore", lstmcore.__version__),
                ("Python", platform.python_version()),
                *((name, _version(name)) for name in ("torch", "numba", "llvmlite", "numpy", "triton")),
                ("system", f"{platform.system()} {platform.machine()}"),
                (
                    "processor",
                    f"{binding.get_host_cpu_name()} ({', '.join(f for f in FEATURES if host.get(f)) or '-'})",
                ),
                ("kernels for", f"{isa}, float32 in blocks of {float32}"),
                ("threads", f"{threads.count()}, {threads.describe()}"),
                ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
                ("kernel cache", f"{place} ({len(files)} files, {size:.1f} MB{writable})"),
            ],
        )
    )
    lines = []
    for name, dtype in DTYPES.items():
        for training in (False, True):
            layer = Layer(torch.device("cpu"), dtype, 1000, 32, 128, 128, training=training)
            choice = backends.choose("auto", (layer,))
            lines.append(
                (name, "training" if training else "inference", choice.name, dict(choice.reasons)[choice.name])
            )
    print("\nbackend='auto' on the CPU, T = 1000, B = 32, I = H = 128:")
    print(table(("dtype", "mode", "runs", "because"), lines))
    print(f"\nGPU kernels, as an NVIDIA GPU with {GPU_SMS} SMs would run them (bfloat16, training, T = 1000, I = H):")
    print(table(("H", "B", "forward", "backward"), [_designs(h, b) for h, b in GPU_SHAPES]))
    return 0


def _designs(hidden: int, batch: int) -> tuple[str, str, str, str]:
    """The designs that the GPU's tiling chooses; needs no GPU."""
    from lstmcore.kernels.gpu import tiling

    forward, backward = (tiling.choose_design(hidden, batch, 1, "16", GPU_SMS, backward) for backward in (False, True))
    return str(hidden), str(batch), str(forward), str(backward)


def prewarm(arguments: argparse.Namespace) -> int:
    """Compiles what a shape needs and keeps it in the cache, so that no first call waits."""
    if not 0 <= arguments.proj_size < arguments.hidden_size:
        message = f"proj_size has to be smaller than hidden_size and not negative: got {arguments.proj_size}"
        print(f"{message} with hidden_size {arguments.hidden_size}", file=sys.stderr)
        return 2
    directions = 2 if arguments.bidirectional else 1
    inputs = [arguments.input_size]
    if arguments.num_layers > 1:
        inputs.append(directions * (arguments.proj_size or arguments.hidden_size))
    device = torch.device(arguments.device)
    backend = "numba" if device.type == "cpu" else "triton"
    lines = []
    for name in arguments.dtype or ["float32"]:
        for training in (False, True) if not arguments.inference else (False,):
            layers = tuple(
                Layer(
                    device,
                    DTYPES[name],
                    arguments.steps,
                    arguments.batch,
                    input_size,
                    arguments.hidden_size,
                    arguments.proj_size,
                    directions,
                    not arguments.no_bias,
                    arguments.packed,
                    training,
                )
                for input_size in inputs
            )
            backends.choose(backend, layers)  # raises an error that says why, if it cannot
            start = time.perf_counter()
            for layer in layers:
                backends.load(backend).prewarm(layer, training=training)
            lines.append((name, "training" if training else "inference", f"{time.perf_counter() - start:.2f} s"))
        if arguments.stream:
            start = time.perf_counter()
            stream.prewarm(DTYPES[name], device)
            lines.append((name, "stream", f"{time.perf_counter() - start:.2f} s"))
    print(table(("dtype", "mode", "took"), lines))
    return 0


@dataclass(frozen=True)
class Comparison:
    """One comparison of the parity check, ``python -m lstmcore check``."""

    name: str
    module: dict[str, Any] = field(default_factory=dict)  # arguments of LSTM over those of DEFAULTS
    steps: int = 33
    batch: int = 5
    form: str = "padded"  # or "packed", "unbatched"
    dtype: str = "float32"


DEFAULTS = {"input_size": 12, "hidden_size": 48}
COMPARISONS = (
    Comparison("plain"),
    Comparison("long", steps=1000, batch=3),
    Comparison("B = 1", batch=1),
    Comparison("wide batch", batch=37),
    Comparison("odd sizes", {"input_size": 1, "hidden_size": 17}, steps=7, batch=3),
    Comparison("H = 256", {"input_size": 256, "hidden_size": 256}, batch=16),
    Comparison("no bias", {"bias": False}),
    Comparison("batch_first", {"batch_first": True}),
    Comparison("unbatched", form="unbatched"),
    Comparison("bidirectional", {"bidirectional": True}),
    Comparison("projection", {"proj_size": 20}),
    Comparison("3 layers", {"num_layers": 3}),
    Comparison("packed", batch=9, form="packed"),
    Comparison("packed, all of it", {"num_layers": 2, "bidirectional": True, "proj_size": 20}, batch=9, form="packed"),
    Comparison("float64", dtype="float64"),
    Comparison("bfloat16", dtype="bfloat16"),
    Comparison("float16", dtype="float16"),
)


def check(arguments: argparse.Namespace) -> int:
    """Compares outputs and all gradients with float64 ``torch.nn.LSTM`` on this machine."""
    warnings.filterwarnings("ignore", message="LSTM with projections")  # torch's, on its own slow path
    lines, failed = [], 0
    start = time.perf_counter()
    for index, case in enumerate(COMPARISONS):
        torch.manual_seed(index)
        kwargs: dict[str, Any] = {**DEFAULTS, **case.module}
        oracle = nn.LSTM(**kwargs, dtype=torch.float64)
        tensors = _tensors(case, oracle)
        dtype = DTYPES[case.dtype]
        modules = [
            oracle,
            nn.LSTM(**kwargs, dtype=dtype, device=arguments.device),
            lstmcore.LSTM(**kwargs, dtype=dtype, device=arguments.device, backend=arguments.backend),
        ]
        for module in modules[1:]:
            module.load_state_dict(oracle.state_dict())
        with torch.no_grad():  # all of them start from values that the dtype can represent
            oracle.load_state_dict({name: value.double().cpu() for name, value in modules[1].state_dict().items()})
        tensors = [tensor.to(dtype).double() for tensor in tensors]
        roundings = 1 if torch.finfo(dtype).bits == 16 else 8  # 16-bit types round what they return, and little else
        truth, torchs, ours = ([*_run(case, module, tensors)] for module in modules)
        for what, at in (("outputs", slice(0, 3)), ("gradients", slice(3, None))):
            error, peer = _error(ours[at], truth[at]), _error(torchs[at], truth[at])
            tolerance = 2 * peer + roundings * torch.finfo(dtype).eps  # twice the error of torch's own
            good = error <= tolerance  # False for NaN
            failed += not good
            lines.append((case.name, case.dtype, what, f"{error:.1e}", f"{tolerance:.1e}", "ok" if good else "FAILED"))
    print(table(("case", "dtype", "what", "max error", "tolerance", "result"), lines))
    seconds = time.perf_counter() - start
    print(f"\n{len(lines) - failed} of {len(lines)} ok in {seconds:.1f} s (errors relative to the largest value)")
    return 1 if failed else 0


def _tensors(case: Comparison, oracle: nn.LSTM) -> list[Tensor]:
    """input, h_0, c_0 and the gradients of output, h_n, c_n, drawn in float64."""
    shape = {
        "padded": (case.batch, case.steps) if oracle.batch_first else (case.steps, case.batch),
        "packed": (case.batch, case.steps),
        "unbatched": (case.steps,),
    }[case.form]
    directions = 2 if oracle.bidirectional else 1
    width = oracle.proj_size or oracle.hidden_size
    rows = () if case.form == "unbatched" else (case.batch,)
    states = (oracle.num_layers * directions, *rows)
    sizes = [(*shape, oracle.input_size), (*states, width), (*states, oracle.hidden_size), (*shape, directions * width)]
    return [torch.randn(size, dtype=torch.float64) for size in (*sizes, sizes[1], sizes[2])]


def _run(case: Comparison, module: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """output, h_n, c_n, then the gradients of input, h_0, c_0 and every parameter."""
    like = next(module.parameters())
    input, h_0, c_0, *grads = (tensor.to(like).detach().requires_grad_() for tensor in tensors)
    if case.form == "packed":
        lengths = [1 + (7 * row) % case.steps for row in range(case.batch)]  # unsorted
        packed = pack_sequence([sequence[:n] for sequence, n in zip(input, lengths, strict=True)], enforce_sorted=False)
        output, states = module(packed, (h_0, c_0))
        output = output.data
        grads[0] = grads[0].flatten(0, 1)[: len(output)]
    else:
        output, states = module(input, (h_0, c_0))
    outputs = [output, *states]
    found = torch.autograd.grad(outputs, [input, h_0, c_0, *module.parameters()], [grad.detach() for grad in grads])
    return [tensor.detach().double().cpu() for tensor in (*outputs, *found)]


def _error(ours: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest error of any tensor, relative to the largest value of the true one; NaN if any value is."""
    errors = [(a - b).abs().max() / b.abs().max().clamp_min(1e-12) for a, b in zip(ours, truth, strict=True)]
    return float(torch.stack(errors).max())


def flow(arguments: argparse.Namespace) -> int:
    """Runs the demonstration of the gradient flow, which is in a checkout only and has options of its own."""
    examples = Path(lstmcore.__file__).parents[1] / "examples"
    if not (examples / "gradient_flow").is_dir():
        raise RuntimeError(
            "the demonstration is not installed with the package: it is in lstmcore's source, where "
            "`python examples/gradient_flow` runs it"
        )
    sys.path.insert(0, str(examples))
    return importlib.import_module("gradient_flow.command").main(arguments.rest, prog="python -m lstmcore flow")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _size(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lstmcore", description=lstmcore.__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=lstmcore.__version__)
    commands = parser.add_subparsers(title="commands", dest="name", required=True, metavar="COMMAND")

    def add(command: Any, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(command.__name__, help=help, description=f"{help[0].upper()}{help[1:]}.")
        added.set_defaults(command=command)
        return added

    def device(text: str) -> str:
        if torch.device(text).type == "cuda" and not torch.cuda.is_available():
            message = f"torch {torch.__version__} finds no CUDA device here; use --device cpu"
            raise argparse.ArgumentTypeError(message)
        return text

    add(info, "show versions, CPU features, threads, the kernel cache, and which backend would run what")

    warm = add(prewarm, "compile the kernels that a module of these sizes needs, so that no first call waits")
    warm.add_argument("--input-size", type=_size, required=True, metavar="I", help="features of the input")
    warm.add_argument("--hidden-size", type=_size, required=True, metavar="H", help="features of the states")
    warm.add_argument("--num-layers", type=_size, default=1, metavar="L", help="layers (default: 1)")
    warm.add_argument("--proj-size", type=int, default=0, metavar="P", help="size of the projection (default: none)")
    warm.add_argument("--bidirectional", action="store_true", help="both directions of time")
    warm.add_argument("--no-bias", action="store_true", help="a module without biases")
    warm.add_argument("--batch", type=_size, default=32, metavar="B", help="rows of a batch (default: 32)")
    warm.add_argument("--steps", type=_size, default=1000, metavar="T", help="steps of a sequence (default: 1000)")
    warm.add_argument("--packed", action="store_true", help="rows of different lengths")
    warm.add_argument("--inference", action="store_true", help="leave out what only training needs")
    warm.add_argument("--stream", action="store_true", help="also what lstmcore.Stream needs (on the CPU)")
    warm.add_argument("--dtype", action="append", choices=DTYPES, help="repeat it for several (default: float32)")

    warm.add_argument("--device", type=device, default="cpu", help="where the module will run (default: cpu)")

    parity = add(check, "compare outputs and all gradients with float64 torch.nn.LSTM on this machine")
    parity.add_argument("--backend", choices=backends.names(), default="auto", help="what to check (default: auto)")
    parity.add_argument("--device", type=device, default="cpu", help="where to check it (default: cpu)")

    add(flow, "show which gradients survive long sequences, and which models learn from them, in pictures")
    return parser
