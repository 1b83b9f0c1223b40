"""What a visit leaves behind, as few files: the log, the summary, the rows, and one archive of everything else."""

from __future__ import annotations

import io
import itertools
import zipfile
from collections.abc import Iterable
from pathlib import Path

MOST_FILES = 8
MOST_BYTES = 16 * 2**20  # of one file
ARCHIVE = "rest.zip"
KEPT = (".log", ".txt", ".csv")  # what somebody reads first stays as it is, up to MOST_FILES - 1 of them


def listing(out: Path) -> dict[Path, tuple[int, int]]:
    """The files under a folder, each with what changes when it is written."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def _compressed(path: Path, name: str) -> int:
    """Bytes that a file adds to an archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, name)
    return buffer.tell()


def _unused(path: Path) -> Path:
    """The path, or one with a number where an earlier visit's archive has it."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], others) if not each.exists())


def pack(out: Path, before: Iterable[tuple[Path, tuple[int, int]]] = ()) -> list[str]:
    """Leaves at most ``MOST_FILES`` of the files that are new since ``before``, none over ``MOST_BYTES``.

    The others move into one archive; one that does not fit there either stays where it is.  A line for each such file,
    and one on the archive.
    """
    known = dict(before)
    new = [path for path, state in listing(out).items() if known.get(path) != state and path != out / ARCHIVE]
    small = [path for path in new if path.parent == out and path.suffix in KEPT and path.stat().st_size <= MOST_BYTES]
    small.sort(key=lambda path: KEPT.index(path.suffix))
    kept = small[: MOST_FILES - 1]
    rest = [path for path in new if path not in kept]
    if not rest:
        return []
    target = _unused(out / ARCHIVE)
    told, room, packed = [], MOST_BYTES - 1024, []
    for path in sorted(rest, key=lambda path: path.stat().st_size):
        size = _compressed(path, str(path.relative_to(out)))
        if size > room:
            told.append(f"too large to pack, left as it is: {path.relative_to(out)} ({path.stat().st_size} bytes)")
            continue
        room -= size
        packed.append(path)
    if not packed:
        return told
    with zipfile.ZipFile(target, "x", zipfile.ZIP_DEFLATED) as archive:
        for path in packed:
            archive.write(path, str(path.relative_to(out)))
    for path in packed:
        path.unlink()
    for folder in sorted({path.parent for path in packed} - {out}, reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    return [*told, f"{len(packed)} more files are in {target.name}"]
