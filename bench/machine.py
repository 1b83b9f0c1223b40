"""What a row has to say about where it was measured."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

UNITS = {"cpu": ("thread", "t"), "cuda": ("multiprocessor", "sm")}  # what ``units`` counts: in words, in a file's name


@cache
def device_name(device: str = "cpu") -> str:
    """The processor as its maker calls it; a CPU with the widest instructions torch sees: "AMD EPYC 9R14 (AVX512)"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        name = found[1]
    elif platform.system() == "Darwin":
        brand = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], stdout=subprocess.PIPE, text=True, check=True
        )
        name = brand.stdout
    name = re.sub(r"\((R|TM)\)|\s+@.*$", "", name)
    return f"{' '.join(name.split())} ({torch.backends.cpu.get_cpu_capability()})"


def units(device: str = "cpu") -> int:
    """How many of its parts share the work: torch's threads, or all multiprocessors of a GPU."""
    return int(gpu().multi_processor_count) if device == "cuda" else torch.get_num_threads()


def counted(number: int, device: str = "cpu") -> str:
    """So many of a device's parts, in words: "2 threads", "132 multiprocessors"."""
    return f"{number} {UNITS[device][0]}{'s' if number > 1 else ''}"


def gpu() -> torch.cuda._CudaDeviceProperties:
    """The present GPU, as CUDA describes it."""
    return torch.cuda.get_device_properties(torch.cuda.current_device())


def slug(device: str = "cpu") -> str:
    """The name of a results file: rows in one file can be compared with each other."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}-{units(device)}{UNITS[device][1]}"


@cache
def commit() -> str:
    """The short hash of the checkout, marked where it has changes; "unknown" outside of one."""
    if shutil.which("git") is None:
        return "unknown"

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=False,
        )

    head = git("rev-parse", "--short", "HEAD")
    if head.returncode != 0:
        return "unknown"
    code = (".", ":(exclude)results", "../kernels", "../lstmcore")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def _version(package: str) -> str:
    """The version of a package, or nothing where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def cudnn() -> str:
    """The version of cuDNN that torch runs, as its maker writes it: 91300 is 9.13.0."""
    number = torch.backends.cudnn.version()
    return "" if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


@cache
def versions() -> dict[str, str]:
    """The versions that a figure depends on."""
    return {"torch": torch.__version__} | {
        name: _version(name) for name in ("numba", "lstmcore", "triton", "onnxruntime")
    }
