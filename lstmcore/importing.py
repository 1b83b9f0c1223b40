"""What is to be done once another library has been imported: it is not imported here, few programs need it.

``FlopCounterMode`` and opacus keep tables of what they know.  Entering lstmcore there takes their modules, which would
make ``import lstmcore`` slow for everyone else, and impossible where opacus is not installed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after(name: str, then: Callable[[], None]) -> None:
    """Calls ``then`` when the module ``name`` has been imported: now, if it has.

    The import does not fail if ``then`` does: that is a warning.
    """
    if name in sys.modules:
        _call(name, then)
        return
    _finder.waiting[name] = then
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _call(name: str, then: Callable[[], None]) -> None:
    try:
        then()
    except Exception as error:
        warnings.warn(f"lstmcore does not work with this version of {name}: {error!r}", stacklevel=2)


class _Finder(MetaPathFinder):
    """Asks the others for the modules that are waited for, and has their loader say when it is done."""

    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[], None]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        for other in sys.meta_path[sys.meta_path.index(self) + 1 :]:  # those before have been asked
            spec = other.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    self._follow(name, spec.loader)
                return spec
        return None

    def _follow(self, name: str, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            then = self.waiting.pop(name, None)
            if not self.waiting and self in sys.meta_path:
                sys.meta_path.remove(self)
            if then is not None:
                _call(name, then)

        loader.exec_module = exec_module


_finder = _Finder()
