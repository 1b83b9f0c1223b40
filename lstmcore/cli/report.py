"""``info``: all that a report of a fault needs, in one piece."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch

from lstmcore import backends
from lstmcore.cli import facts
from lstmcore.cli.options import DTYPES
from lstmcore.cli.parity import COMPARISONS, compare
from lstmcore.kernels.contract import Layer
from lstmcore.tables import table

GPU_SMS, GPU_SHARED = 132, 227 * 1024  # of an H100 or H200: SMs, and bytes of shared memory for a program
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
QUICK = ("plain", "bidirectional", "packed, all of it", "float64", "bfloat16")  # cases of the check that info makes


def info(arguments: argparse.Namespace) -> int:
    """Versions, machine, threads, cache, variables, and which backend would run what."""
    parts = list(_parts())
    good = True
    if arguments.check:
        good, lines = _checked()
        parts.append(lines)
    text = "\n\n".join(parts)
    print(_folded(text) if arguments.markdown else text)
    return int(not good)


def _folded(text: str) -> str:
    """The text as Markdown that takes one line until it is opened."""
    return f"<details><summary>{facts.summary()}</summary>\n\n```text\n{text}\n```\n\n</details>"


def _parts() -> Iterator[str]:
    for title, lines in facts.sections():
        yield table((title, ""), lines)
    yield facts.told(_choices)
    yield facts.told(_designs)


def _choices() -> str:
    """What ``"auto"`` would run on the CPU."""
    lines = []
    for name, dtype in DTYPES.items():
        for training in (False, True):
            layer = Layer(torch.device("cpu"), dtype, 1000, 32, 128, 128, training=training)
            choice = backends.choose("auto", (layer,), backends.Situation.now(layer, extended=False))
            lines.append(
                (name, "training" if training else "inference", choice.name, dict(choice.reasons)[choice.name])
            )
    title = "backend='auto' on the CPU, T = 1000, B = 32, I = H = 128:"
    return f"{title}\n{table(('dtype', 'mode', 'runs', 'because'), lines)}"


def _designs() -> str:
    """The designs that the GPU's tiling chooses; needs no GPU."""
    from lstmcore.kernels.gpu import tiling

    lines = [
        (
            str(hidden),
            str(batch),
            *(
                str(tiling.choose_design(hidden, batch, 1, "16", GPU_SMS, backward, shared=GPU_SHARED, wgmma=True))
                for backward in (False, True)
            ),
        )
        for hidden, batch in GPU_SHAPES
    ]
    title = f"GPU kernels, as an NVIDIA GPU with {GPU_SMS} SMs would run them (bfloat16, training, T = 1000, I = H):"
    return f"{title}\n{table(('H', 'B', 'forward', 'backward'), lines)}"


def _checked() -> tuple[bool, str]:
    """Whether a few cases agree with ``torch.nn.LSTM``, and a line on each device; the errors of those that do not."""
    cases = [case for case in COMPARISONS if case.name in QUICK]
    good, found = True, []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        start = time.perf_counter()
        try:
            lines = compare(cases, device, "auto")
        except Exception as error:  # it is what there is to report
            good = False
            found.append((device, f"FAILED: {type(error).__name__}: {error}"))
            continue
        wrong = [
            f"{line.case.name} {line.case.dtype}, {line.what}: {line.error:.1e}" for line in lines if not line.good
        ]
        good = good and not wrong
        took = f"{len(lines) - len(wrong)} of {len(lines)} ok in {time.perf_counter() - start:.1f} s"
        found.append((device, took + (f"; FAILED: {'; '.join(wrong)}" if wrong else "")))
    return good, table(("beside torch.nn.LSTM", ""), [(device, facts.private(text)) for device, text in found])
