"""Sizes of the processor's caches, as the operating system reports them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

UNKNOWN = 1 << 20  # bytes: assumed if the system does not say; most second-level caches have this or more


class Caches(NamedTuple):
    """The caches of a core."""

    second_level: int  # bytes; if several cores have one together, this core's part
    vendor: str  # as x86 processors call themselves; "" where unknown


def _allowed() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]


def _listed(path: Path) -> int:
    """How many processors a list of the kernel's names: ``0-3,8``."""
    ranges = (part.partition("-") for part in path.read_text().strip().split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMG]?)", text.strip()).groups()  # type: ignore[union-attr]
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def _second_level(processor: Path) -> int:
    """Bytes for one processor, from its folder in sysfs; raises OSError or ValueError if that does not say."""
    for index in sorted(processor.glob("cache/index*")):
        if (index / "level").read_text().strip() == "2" and (index / "type").read_text().strip() != "Instruction":
            threads_of_core = _listed(processor / "topology" / "thread_siblings_list")
            return _bytes((index / "size").read_text()) * threads_of_core // _listed(index / "shared_cpu_list")
    raise ValueError(f"{processor} lists no second-level cache")


def read(system: Path = Path("/sys/devices/system/cpu"), cpuinfo: Path = Path("/proc/cpuinfo")) -> Caches:
    """The caches of the processors that this process may use; the smallest if they differ."""
    try:
        size = min(_second_level(system / f"cpu{number}") for number in _allowed())
    except (OSError, ValueError, AttributeError):  # no such files (macOS, Windows, some containers), or odd ones
        size = UNKNOWN
    try:
        found = re.search(r"^vendor_id\s*:\s*(\S+)", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return Caches(size or UNKNOWN, found[1] if found else "")
