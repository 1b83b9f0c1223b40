"""The tables of timings: those that ``python -m lstmcore tune`` keeps on this machine, and those of the package.

A table is a CSV file, one row a timing; each row also says on what device and with which versions.  A table that was
tuned here counts if device, versions and kernels are those of this process; one of the package (``measured/``) if the
device is.  What is tuned here goes before.  Files are read once in a process, when the first choice needs them, and a
file that is not in order is not used: the reason is in :func:`consult` and ``python -m lstmcore info``.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import functools
import hashlib
import io
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lstmcore.backends import machine, timings
from lstmcore.backends.machine import Device, Versions
from lstmcore.backends.timings import Class, Timing, Verdict
from lstmcore.kernels.contract import Layer

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

COMMITTED = Path(__file__).parent / "measured"
COMMAND = "python -m lstmcore tune"
HERE, PACKAGE = "tuned here", "timed for the package"  # where a timing is from, in words
FIELDS = (
    "device_kind", "device", "units", "isa", "torch", "compiler", "library", "kernels", *Timing._fields,
)  # fmt: skip
_LARGEST = 1 << 20  # bytes of a file: a table has less than a tenth
_MOST = 1 << 31


class Table(NamedTuple):
    """What was timed on a device, with one set of versions."""

    device: Device
    versions: Versions
    timings: tuple[Timing, ...]

    @property
    def date(self) -> str:
        """Of the latest timing; "" without any."""
        return max((each.date for each in self.timings), default="")

    def with_timings(self, new: Iterable[Timing]) -> Table:
        """The same with these, in place of those of the same class and sizes."""
        every = {(each.cls, each.hidden, each.batch): each for each in (*self.timings, *new)}
        return self._replace(timings=tuple(sorted(every.values())))


# Text


def to_text(table: Table) -> str:
    """The table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(FIELDS)
    for each in table.timings:
        values = (int(value) if isinstance(value, bool) else value for value in each)
        writer.writerow([*table.device, *table.versions, *values])
    return text.getvalue()


def _whole(low: int, high: int = _MOST) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"expected an integer from {low} to {high}")
        return int(text)

    return parse


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 < value < _MOST):
        raise ValueError("expected a positive number")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("expected a number that is not negative")
    return value


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return text

    return parse


def _date(text: str) -> str:
    return datetime.date.fromisoformat(text).isoformat()


_PARSERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("device", "isa", "torch", "compiler", "library", "kernels"), str),
    **dict.fromkeys(("units", "hidden", "batch", "short", "long"), _whole(1)),
    **dict.fromkeys(("ours_short_ms", "ours_long_ms", "torch_short_ms", "torch_long_ms"), _positive),
    "device_kind": _one_of("cpu", "cuda"),
    "kind": _one_of(*timings.KINDS),
    "arithmetic": _one_of(*timings.ARITHMETICS),
    "mode": _one_of(*timings.MODES),
    "noise": _share,
    "right": lambda text: bool(_whole(0, 1)(text)),
    "date": _date,
    "seed": _whole(0),
}


def _parsed(line: dict[str, str]) -> list[Any]:
    values = []
    for field in FIELDS:
        try:
            values.append(_PARSERS[field](line[field]))
        except (ValueError, TypeError, AttributeError) as error:  # of a line that is cut short, None
            raise ValueError(f"{field} is {line[field]!r}: {error}") from None
    return values


def from_text(text: str) -> Table:
    """The inverse of :func:`to_text`; raises ValueError for anything that it has not written."""
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError("its columns are not those of a table of timings")
        rows = []
        for line in reader:
            if None in line:
                raise ValueError(f"line {reader.line_num} has more than {len(FIELDS)} entries")
            rows.append(_parsed(line))
    except csv.Error as error:
        raise ValueError(f"it is not CSV: {error}") from None
    if not rows:
        raise ValueError("it has no timings")
    heads = {tuple(row[:8]) for row in rows}
    if len(heads) > 1:
        raise ValueError("its rows are of more than one device, or of more than one set of versions")
    found = tuple(Timing(*row[8:]) for row in rows)
    if any(each.short >= each.long for each in found):
        raise ValueError("a short sequence of it is not shorter than the long one")
    if len({(each.cls, each.hidden, each.batch) for each in found}) < len(found):
        raise ValueError("it has two timings of one shape")
    (head,) = heads
    return Table(Device(*head[:4]), Versions(*head[4:]), found)


# Files


def directory() -> Path:
    """Where this machine's tables are kept, beside the compiled kernels (it may not exist yet)."""
    from lstmcore.kernels.cpu import jit

    return jit.cache_directory() / "tuned"


def path_of(device: Device, versions: Versions) -> Path:
    """The file of this machine's table of a device."""
    key = hashlib.sha256(repr((device, versions)).encode()).hexdigest()[:12]
    return directory() / f"{device.slug}-{key}.csv"


def read(path: Path) -> Table:
    """The table in a file; raises OSError, or ValueError for a file that is not in order."""
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError("it is larger than a table can be")
    return from_text(content.decode())  # UnicodeDecodeError is a ValueError


def write(table: Table, path: Path) -> None:
    """Puts a table into a file, all at once: who reads finds the old one or the new one.  Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
        written = Path(file.name)
        try:
            file.write(to_text(table).encode())
            file.close()
            os.replace(written, path)
        except BaseException:
            written.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One tuning at a time on this machine: two would disturb each other's timings, and overwrite each other's table.

    Raises RuntimeError if another one runs, OSError if nothing can be written beside the compiled kernels.
    """
    directory().mkdir(mode=0o700, parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # nothing is written to it, nor to what it leads to
    with open(os.open(directory() / "lock", flags, 0o600), "rb") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError("another tuning runs on this machine: wait until it is done") from None
        yield  # closing the file, or the end of the process, unlocks it


# What is known here


class Known(NamedTuple):
    """The tables of a device that count in this process, the first before the second, and why others do not."""

    tables: tuple[tuple[str, Path, Table], ...]  # each with HERE or PACKAGE
    ignored: tuple[str, ...]


def _own(device: Device, ignored: list[str]) -> Iterator[tuple[str, Path, Table]]:
    if not directory().is_dir():  # as where nothing was ever tuned: no sources are read to find that out
        return
    versions = machine.versions(device.kind)
    path = path_of(device, versions)
    try:
        table = read(path)
    except FileNotFoundError:
        if others := sorted(directory().glob(f"{device.slug}-*.csv")):
            ignored.append(f"{len(others)} of other versions or kernels in {directory()}: run {COMMAND} again")
        return
    except (OSError, ValueError) as error:
        ignored.append(f"{path} is not used: {error}")
        return
    if (table.device, table.versions) == (device, versions):
        yield HERE, path, table
    else:
        ignored.append(f"{path} is not used: it is of {table.device}, or of other versions")


def _committed(device: Device, ignored: list[str]) -> Iterator[tuple[str, Path, Table]]:
    path = COMMITTED / f"{device.slug}.csv"
    try:
        table = read(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        ignored.append(f"{path} is not used: {error}")
        return
    if table.device == device:
        yield PACKAGE, path, table
    else:
        ignored.append(f"{path} is not used: it is of {table.device}")


@functools.lru_cache(maxsize=64)
def known(where: torch.device, threads: int) -> Known:
    """The tables that count for a device; ``threads``: of a launch, if it is the CPU."""
    device = machine.device(where, threads)
    ignored: list[str] = []
    tables: list[tuple[str, Path, Table]] = []
    try:
        tables += _own(device, ignored)
    except (ImportError, OSError) as error:  # no compiler, and so no place beside its cache
        ignored.append(f"what was tuned here cannot be found: {error}")
    tables += _committed(device, ignored)
    return Known(tuple(tables), tuple(ignored))


def consult(layer: Layer, threads: int, strict: bool) -> Verdict | str:
    """What the tables say of a layer, or a sentence that says why they say nothing; see :class:`Situation`."""
    found = known(layer.device, threads)
    cls, missing = Class.of(layer, strict), [f"; {each}" for each in found.ignored]
    for source, _, table in found.tables:
        timing = timings.nearest(table.timings, cls, layer.hidden_size, layer.batch)
        if isinstance(timing, Timing):
            return timing.verdict(layer.steps, source)
        missing.append(f"; {source}, {timing}")
    device = machine.device(layer.device, threads)
    return f"not measured on {device.name}: `{COMMAND}` does{''.join(missing)}"


def forget() -> None:
    """Reads the files again when they are needed next."""
    known.cache_clear()
