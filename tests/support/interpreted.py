"""Small calls for Triton kernels that are interpreted, and ways to share their work that the tiling would not choose.

T time, B batch, H hidden, P projection, D directions.
"""

from __future__ import annotations

import torch

from .contract import Setup
from .gpu_designs import Share

# Every mask in three steps: rows that end early, or have no step; both directions; resets; a projection.
SMALL = Setup("small", T=3, B=5, H=9, P=4, D=2, lengths=(2, 0, 3, 1, 3), reset=0.3, dtype=torch.float32)
PACKED = Setup("packed", T=3, B=4, H=9, D=2, lengths=(2, 3, 3, 1), packed=True, reset=0.3, dtype=torch.float32)
DENSE = Setup("dense", T=3, B=11, H=9, reset=0.3, batch_first=True, strided=True, dtype=torch.float32)

# One program holds all units or one of several slices; several groups of rows; tiles one after the other, not full;
# tiles of 16 rows; weights in several chunks; weights read in every step.
SHARES = {
    "one_slice": Share(units=32, groups=2, warps=2, chunk=32),
    "tiles": Share(units=8, groups=2, tiles=2, warps=2, chunk=32),
    "tiles_of_16": Share(units=8, tile=16, warps=4, chunk=64),
    "chunks": Share(units=8, warps=2, chunk=16),
    "stream": Share(units=8, groups=2, warps=2, chunk=16, stream=True),
    "wide": Share(units=8, groups=2, warps=2, chunk=8, parts=2),
    "wide_tiles": Share(units=16, tile=16, tiles=2, warps=4, chunk=16, parts=4),
    "stream_one_slice": Share(units=32, warps=2, chunk=16, tiles=2, stream=True),
}
