"""What opacus is told of these modules once it is imported: what it knows of ``torch.nn.LSTM``.

Its hooks see the gradient of a module's first result alone, and want to compute it for each sample from that: not
possible for h_n and c_n.  Its own DPLSTM has hooks inside.  So ``ModuleValidator.validate`` refuses ours in a sentence,
and ``ModuleValidator.fix`` puts a DPLSTM with the same weights in its place.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lstmcore.module import LSTM, LSTMCell

_INSTEAD = "per-sample gradients by torch.func.vmap work with it, and opacus' DPOptimizer takes them as p.grad_sample"


def register() -> None:
    """Enters a validator for each class, and a fixer, where opacus has them for ``torch.nn.LSTM``."""
    from opacus.validators import ModuleValidator, register_module_fixer, register_module_validator
    from opacus.validators.errors import ShouldReplaceModuleError, UnsupportedModuleError

    fix = ModuleValidator.FIXERS[nn.LSTM]

    @register_module_validator(LSTM)
    def validate(module: LSTM) -> list[Any]:
        return [
            ShouldReplaceModuleError(
                "lstmcore.LSTM does not work with opacus' hooks: ModuleValidator.fix(model) puts a DPLSTM with its "
                f"weights in its place; or keep it: {_INSTEAD}"
            )
        ]

    @register_module_fixer(LSTM)
    def replaced(module: LSTM) -> nn.Module:
        return fix(module)

    @register_module_validator(LSTMCell)
    def validate_cell(module: LSTMCell) -> list[Any]:
        return [
            UnsupportedModuleError(
                "lstmcore.LSTMCell does not work with opacus' hooks, nor does torch.nn.LSTMCell: use "
                f"opacus.layers.DPLSTM; or keep it: {_INSTEAD}"
            )
        ]
