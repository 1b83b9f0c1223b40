"""Which instruction multiplies matrices: pure functions from dtype and features of the processor.

A *term* is what one multiplication takes from a row: a value, or a pair of adjacent bfloat16 values that a dot-product
instruction multiplies by another pair and adds to a float32 sum.  A term of a float32 product and a pair have four
bytes each, so both are packed, addressed and broadcast alike; all depths of products are counted in terms.

``fma``
    A value at a time, in the dtype of the computation.
``dpbf16ps``
    AVX512-BF16: a pair, 16 sums of one row.
``tdpbf16ps``
    AMX: tiles of up to 16 rows of 16 pairs, 16 sums of each row.

Their sums round differently, so the instruction is the processor's, never a matter of the shape: a row's result does
not depend on the rows beside it.  What a product reads is in its *operand* dtype: bfloat16 for pairs, to which float32
results are rounded, to nearest even; sums, cell state and activations stay in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

from . import caches

TILE_ROWS = 16  # of an AMX tile: 16 rows of 64 bytes
TILE_TERMS = 16  # pairs in a row of a tile


class Products(NamedTuple):
    """How matrix products multiply.  ``emulated``: by the portable instructions that round as this one does."""

    instruction: str = "fma"
    emulated: bool = False

    @property
    def paired(self) -> bool:
        """Whether a term is a pair of bfloat16 values."""
        return self.instruction != "fma"

    @property
    def tiled(self) -> bool:
        return self.instruction == "tdpbf16ps"

    @property
    def values(self) -> int:
        """Values in a term."""
        return 2 if self.paired else 1

    @property
    def group(self) -> int:
        """Terms that one instruction takes from a row: depths are whole multiples of it."""
        return TILE_TERMS if self.tiled else 1

    def terms(self, values: int) -> int:
        """Terms of a row of ``values``, in whole groups."""
        whole = self.values * self.group
        return -(-values // whole) * self.group


FMA = Products()


def products_for(dtype: torch.dtype, features: Mapping[str, bool], vendor: str, tiles: bool) -> Products:
    """The instruction for tensors of ``dtype``; ``features``: by LLVM's names; ``tiles``: the system permits AMX.

    A Xeon without AMX (or the permission for it) keeps to fma: its dot products are slower (82 to 88 GF/s a core, where
    its multiply-adds reach 175; an AMD EPYC of Zen 4 does 230 against 115).
    """
    if dtype != torch.bfloat16:
        return FMA
    if tiles and features.get("amx-tile") and features.get("amx-bf16"):
        return Products("tdpbf16ps")
    if features.get("avx512bf16") and vendor == "AuthenticAMD":
        return Products("dpbf16ps")
    return FMA


@functools.cache
def features() -> Mapping[str, bool]:
    """The features by LLVM's names that Numba compiles for: this processor's, unless its settings say otherwise."""
    import llvmlite.binding  # a part of the compiler, which importing the package does not load
    from numba.core import config

    if not config.ENABLE_AVX:
        return {}
    chosen = config.CPU_FEATURES
    if chosen is None and config.CPU_NAME != "generic":
        return llvmlite.binding.get_host_cpu_features()
    return {each[1:]: each.startswith("+") for each in (chosen or "").split(",") if each}


def native_bfloat16() -> bool:
    """Whether an instruction rounds 16 lanes to bfloat16."""
    return bool(features().get("avx512bf16"))


@functools.cache
def tiles_permitted() -> bool:
    """Asks the operating system once, for the whole process, to let it use AMX's tiles; whether it does."""
    return bool(features().get("amx-tile")) and torch.cpu._init_amx()


@functools.cache
def this_machines(dtype: torch.dtype, isa: str) -> Products:
    """The products of this machine whose blocks are shaped for ``isa`` (see ``tiling.cpu_isa``)."""
    if isa != "avx512":
        return FMA
    return products_for(dtype, features(), caches.read().vendor, tiles_permitted())
