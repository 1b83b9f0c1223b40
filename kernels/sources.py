"""A hash of kernels' sources: what was compiled, or measured, of others is out of date."""

from __future__ import annotations

import hashlib
from pathlib import Path


def stamp(folder: Path, versions: str) -> str:
    """A hash of the Python sources in ``folder`` and of those that all backends share, and of ``versions``."""
    digest = hashlib.sha256(versions.encode())
    for path in sorted([*folder.glob("*.py"), *Path(__file__).parent.glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
