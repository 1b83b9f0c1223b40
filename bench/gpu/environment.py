"""What machine this is, in one screen; runs without a GPU too, and says so."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from bench import machine
from bench.tables import KEY_FIGURES


def driver() -> str:
    """The version of NVIDIA's driver, as its own tool says it; ``info`` asks alike, but needs the package for it."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown: nvidia-smi is not on the PATH"
    done = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=15,
        check=False,
    )
    return done.stdout.strip().replace("\n", ", ") or "unknown: nvidia-smi did not say"


def kernels() -> str:
    """Whether the package is installed with its kernels, which the repository's root alone does not make importable."""
    try:
        importlib.import_module("lstmcore.kernels")
    except ImportError as error:
        return f"missing ({error}); run `pip install --no-build-isolation --no-deps -e .`"
    return "importable"


def facts() -> Iterator[tuple[str, str]]:
    """Names and values."""
    yield "Python", f"{platform.python_version()}, {sys.executable}"
    yield from ((name, text or "not installed") for name, text in machine.versions().items())
    yield "lstmcore.kernels", kernels()
    yield "commit", machine.commit()
    yield "CUDA of torch", torch.version.cuda or "none: a CPU build"
    yield "cuDNN", machine.cudnn() or "none"
    yield "driver", driver()
    if not torch.cuda.is_available():
        yield "device", "no CUDA device"
        return
    gpu = machine.gpu()
    yield "device", gpu.name
    yield "compute capability", f"{gpu.major}.{gpu.minor}"
    yield "multiprocessors", str(gpu.multi_processor_count)
    yield "memory", f"{gpu.total_memory / 2**30:.1f} GiB"
    for what, name in (
        ("shared memory of a multiprocessor", "shared_memory_per_multiprocessor"),
        ("shared memory of a block, at most", "shared_memory_per_block_optin"),
        ("L2", "L2_cache_size"),
    ):
        if (size := getattr(gpu, name, None)) is not None:
            yield what, f"{size / 1024:.0f} KiB"


def run() -> int:
    """``python -m bench environment``."""
    found = dict(facts())
    for name, value in found.items():
        print(f"{name:<34} {value}")
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", "cuDNN"))
    print(f"{KEY_FIGURES}{found['device']}, {versions}")
    return 1 if found["lstmcore.kernels"].startswith("missing") else 0
