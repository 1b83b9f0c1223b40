"""Fixtures of the Triton backend."""

from __future__ import annotations

import pytest

from ..support import gpu_designs
from ..support.gpu_designs import Share


@pytest.fixture(params=["resident", "split"])
def design(request, monkeypatch) -> str:
    """Both designs, whatever the tiling would take; the split one with as little work as it can have here."""
    if request.param == "resident":
        gpu_designs.use(monkeypatch, "resident")
    else:
        gpu_designs.use(monkeypatch, share=Share(units=8, warps=2, chunk=64))
    return request.param
