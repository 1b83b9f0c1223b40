"""What a row has to say about where it was measured."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch


@cache
def device_name() -> str:
    """The processor as its maker calls it, with the widest instructions torch sees: "AMD EPYC 9R14 (AVX512)"."""
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


def slug(device: str, threads: int) -> str:
    """The name of a results file: rows in one file can be compared with each other."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{threads}t"


@cache
def commit() -> str:
    """The short hash of the checkout, marked where it has changes; "unknown" outside of one."""

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


@cache
def versions() -> dict[str, str]:
    """The versions that a figure depends on."""
    return {"torch": torch.__version__, "numba": version("numba"), "lstmcore": version("lstmcore")}
