"""Designs made by hand for the Triton backend: ways to share work that the tiling would not choose at small sizes.

U units, BT rows of a tile, K terms of a chunk, KW warps.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from lstmcore.kernels.gpu import tiling
from lstmcore.kernels.gpu.tiling import Design

ceil_div = tiling.ceil_div
CHOOSE_DESIGN = tiling.choose_design  # as it is before a test changes it


@dataclass(frozen=True)
class Share:
    """How a test wants the work of a split design shared; the tiling's choice where 0."""

    units: int = 0
    tile: int = 8
    groups: int = 1
    tiles: int = 0
    warps: int = 0
    chunk: int = 0
    stream: bool = False
    parts: int = 0  # where not 0, the design is a wide one

    def choose_design(
        self, hidden: int, batch: int, directions: int, precision: str, sms: int, backward: bool, **kw
    ) -> Design:
        """Takes the place of ``tiling.choose_design``."""
        chosen = CHOOSE_DESIGN(hidden, batch, directions, precision, sms, backward, **kw, kind="split")
        units = self.units or chosen.units
        if backward and not self.parts:
            units = max(units, 16)  # what the tiling takes at least
        groups = min(self.groups, batch)
        per_group = ceil_div(batch, groups)
        tiles = max(self.tiles, ceil_div(per_group, self.tile))
        terms = 4 * hidden if backward else hidden
        chunk = self.chunk or chosen.chunk
        shared = replace(
            chosen,
            units=units,
            tile=self.tile,
            rows=ceil_div(per_group, tiles),
            groups=groups,
            tiles=tiles,
            slices=ceil_div(hidden, units),
            warps=self.warps or chosen.warps,
            chunk=chunk,
            chunks=ceil_div(terms, chunk),
            stream=self.stream,
        )
        return self.wide(shared, hidden, backward) if self.parts else shared

    def wide(self, split: Design, hidden: int, backward: bool) -> Design:
        """The wide design that shares rows and units as a split one does."""
        parts = self.parts if backward else 1
        of_part = ceil_div(ceil_div(hidden, parts), split.chunk) * split.chunk
        chunks = (4 if backward else 1) * of_part // split.chunk
        slices = ceil_div(hidden, split.units * parts) * parts
        return replace(split, kind="wide", slices=slices, chunks=chunks, parts=parts, held=min(1, chunks - 1))


def use(monkeypatch, kind: str | None = None, share: Share | None = None) -> None:
    """Makes the backend take the tiling's design of this ``kind``, or the split design that is shared like this."""
    choose = share.choose_design if share is not None else functools.partial(CHOOSE_DESIGN, kind=kind)
    monkeypatch.setattr(tiling, "choose_design", choose)
