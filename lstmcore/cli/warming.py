"""``prewarm``: compiles ahead of the first call."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from lstmcore import backends, stream
from lstmcore.backends import self_check
from lstmcore.cli.options import DTYPES
from lstmcore.kernels.contract import Layer
from lstmcore.tables import table


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
                if backends.REGISTRY[backend].checked:  # each process repeats the check, from what this compiles
                    self_check.refusal(backend, layer, extended=True)
            lines.append((name, "training" if training else "inference", f"{time.perf_counter() - start:.2f} s"))
        if arguments.stream:
            start = time.perf_counter()
            stream.prewarm(DTYPES[name], device)
            lines.append((name, "stream", f"{time.perf_counter() - start:.2f} s"))
    print(table(("dtype", "mode", "took"), lines))
    return 0
