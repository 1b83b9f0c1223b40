"""What of a machine's tools the tests ask for."""

from __future__ import annotations

import os
import shutil

import pytest


def cpp_compiler() -> str | None:
    """The C++ compiler that torch's inductor would call."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)


needs_cpp = pytest.mark.skipif(
    cpp_compiler() is None, reason="torch's inductor needs a C++ compiler: neither $CXX, g++ nor clang++ found"
)
