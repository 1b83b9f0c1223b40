"""What timings depend on: the device that they were taken on, and the versions and sources that ran."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from lstmcore.kernels import sources
from lstmcore.kernels.cpu import tiling

_CPUINFO = Path("/proc/cpuinfo")
_UNITS = {"cpu": "threads", "cuda": "SMs"}


class Device(NamedTuple):
    """A device, as far as another one with the same entries takes the same time."""

    kind: str  # "cpu" or "cuda"
    name: str  # as its maker calls it
    units: int  # threads of a launch, or multiprocessors
    isa: str  # "avx512", or the compute capability

    def __str__(self) -> str:
        return f"{self.name} ({self.isa}, {self.units} {_UNITS.get(self.kind, 'units')})"

    @property
    def slug(self) -> str:
        """The device in the name of a file."""
        words = f"{self.name} {self.isa} {self.units}{_UNITS.get(self.kind, '')[:2]}".lower()
        return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


class Versions(NamedTuple):
    """What ran on a device."""

    torch: str
    compiler: str  # "numba 0.66.0", "triton 3.6.0"
    library: str  # "cuDNN 9.19.0"; on the CPU torch's version says which oneDNN
    kernels: str  # a hash of the kernels' sources


@functools.cache
def processor() -> str:
    """The processor as its maker calls it; what it is, where nothing says its name."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, UnicodeDecodeError, subprocess.SubprocessError):
        if _CPUINFO.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)):
            name = found[1]
        elif platform.system() == "Darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=10).stdout
    return " ".join(re.sub(r"\((R|TM)\)|\s+@.*$", "", name).split())


def cudnn() -> str:
    """The version of cuDNN that torch runs, as its maker writes it: 91300 is 9.13.0; "" without."""
    number = torch.backends.cudnn.version()
    return "" if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def device(where: torch.device, threads: int) -> Device:
    """The device that tensors ``where`` are on; ``threads``: of a launch, if it is the CPU."""
    if where.type == "cuda":
        found = torch.cuda.get_device_properties(where)
        return Device("cuda", found.name, found.multi_processor_count, f"{found.major}.{found.minor}")
    return Device(where.type, processor(), threads, tiling.cpu_isa())


@functools.cache
def versions(kind: str) -> Versions:
    """What runs on devices of a kind here."""
    compiler = {"cpu": "numba", "cuda": "triton"}[kind]
    folder = {"cpu": "cpu", "cuda": "gpu"}[kind]
    stamp = sources.stamp(Path(sources.__file__).parent / folder, "")[:16]
    library = f"cuDNN {cudnn()}" if kind == "cuda" else ""
    return Versions(torch.__version__, f"{compiler} {importlib.metadata.version(compiler)}", library, stamp)
