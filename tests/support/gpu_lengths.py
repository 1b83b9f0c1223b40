"""Lengths that only the device knows, for calls that give them on the host."""

from __future__ import annotations

from dataclasses import replace

import torch
from lstmcore.kernels.contract import Rows

CPU = torch.device("cpu")


def on_device(rows: Rows, device: torch.device = CPU) -> Rows:
    """The same rows, their lengths on ``device``."""
    return Rows(rows.steps, rows.batch, batch_first=rows.batch_first, lengths=rows.row_lengths().to(device))


class Changed:
    """A backend whose rows are changed on the way in: to those with lengths on the device, if nothing else is said."""

    def __init__(self, kernels, change=on_device) -> None:
        self.kernels, self.change = kernels, change

    def changed(self, call):
        rows = self.change(call.rows)
        return call._replace(rows=rows, layer=call.layer._replace(ragged=rows.ragged))

    def forward(self, call, **options):
        return self.kernels.forward(self.changed(call), **options)

    def backward(self, call, *given, **options):
        return self.kernels.backward(self.changed(call), *given, **options)


def roomy(rows: Rows) -> Rows:
    return replace(rows, roomy=True)
