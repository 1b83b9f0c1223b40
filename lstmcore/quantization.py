"""What ``torch.ao.quantization`` does with these modules: nothing, and this says so.

``quantize_dynamic``, ``prepare`` and ``prepare_fx`` look modules up by their type, and pass by what they do not find.
But on every module that they walk over they set an attribute ``qconfig``.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import nn


class QConfig:
    """The attribute ``qconfig`` of a class: a plain one, which warns where ``stock`` would have been quantized.

    A descriptor, because it costs nothing until someone sets ``qconfig``, unlike a ``__setattr__``.
    """

    def __init__(self, stock: type[nn.Module]) -> None:
        self.stock = stock

    def __get__(self, module: nn.Module | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        try:
            return module.__dict__["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    def __set__(self, module: nn.Module, qconfig: Any) -> None:
        own = module.__dict__
        again = "qconfig" in own and own["qconfig"] == qconfig
        own["qconfig"] = qconfig
        if not again and (qconfig is not None or self._wanted()):
            name = self.stock.__name__
            warnings.warn(
                f"torch.ao.quantization knows only torch.nn.{name}, so this {type(module).__name__} of lstmcore stays "
                "as it is: before you quantize it, call lstmcore.unpatch(model) if lstmcore.patch moved it, or set "
                f"module.__class__ = torch.nn.{name} if it was built as lstmcore.{name}",
                stacklevel=2,
            )

    def __delete__(self, module: nn.Module) -> None:
        self.__get__(module)
        del module.__dict__["qconfig"]

    def _wanted(self) -> bool:
        """Whether the function of torch that sets None has a configuration for ``stock``.

        It passes on what it found for the type of the module alone, so this looks at its table.
        """
        frame = sys._getframe(2)
        while frame.f_code.co_name == "__setattr__" and frame.f_back is not None:
            frame = frame.f_back
        if not frame.f_globals.get("__name__", "").startswith("torch.ao."):
            return False  # the caller's own None, which exempts the module
        table = frame.f_locals.get("qconfig_dict")
        return table is None or table.get(self.stock) is not None
