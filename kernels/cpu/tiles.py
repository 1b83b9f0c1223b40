"""AMX's tiles: eight registers of up to 16 rows of 64 bytes, and the instruction that multiplies them.

A thread shapes its tiles before it uses them, at every launch, and releases them after it: the shapes are the
processor's state, and torch's own kernels have theirs.  Sums have the first four tiles, rows of A the fifth, and W the
rest, where one is loaded while the others multiply.  A multiplication takes 16 cycles (10 for eight rows or fewer),
and loading W 8 from the first-level cache and some 25 from the second, so nothing is gained by fewer rows but loads and
stores of the sums.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.extending import intrinsic

from .jit import inline
from .products import TILE_ROWS, TILE_TERMS
from .variant import Variant
from .vector import I32, I64, PTR, llvm_call, prefetch

ROWS, TERMS = TILE_ROWS, TILE_TERMS
SUMS, OF_A, OF_W = range(4), 4, (5, 6, 7)  # numbers of tiles
AHEAD = 2  # groups of terms; W is prefetched so far ahead into the first-level cache
I8, VOID = ir.IntType(8), ir.VoidType()


def _load(builder, tile, address, stride):
    llvm_call(builder, "llvm.x86.tileloadd64", VOID, [I8(tile), builder.inttoptr(address, PTR), stride])


def start(builder, begin, vectors):
    """Starts the sums: ``begin``: (address, bytes per row) of adjacent vectors, or None for zeros."""
    for v in range(vectors):
        if begin is None:
            llvm_call(builder, "llvm.x86.tilezero", VOID, [I8(SUMS[v])])
        else:
            _load(builder, SUMS[v], builder.add(begin[0], I64(64 * v)), begin[1])


def multiply(builder, a, apart, w, vectors):
    """Adds the products of a group of terms; ``apart``: bytes from a row of A to the next."""
    _load(builder, OF_A, a, apart)
    for v in range(vectors):
        of_w = OF_W[v % len(OF_W)]
        _load(builder, of_w, builder.add(w, I64(64 * v)), I64(64 * vectors))
        llvm_call(builder, "llvm.x86.tdpbf16ps", VOID, [I8(SUMS[v]), I8(OF_A), I8(of_w)])
        for line in range(ROWS):
            prefetch(builder, builder.add(w, I64((AHEAD * vectors + v) * 64 * ROWS + 64 * line)), near=True)


def store(builder, memory, llvm, vectors):
    """Writes the sums to ``memory`` of vectors ``llvm``: one tile after another, whose rows are adjacent vectors."""
    for v in range(vectors):
        at = builder.gep(memory, [I64(ROWS * v)], source_etype=llvm)
        llvm_call(builder, "llvm.x86.tilestored64", VOID, [I8(SUMS[v]), at, I64(64)])


@intrinsic
def _shape(typingctx, rows):
    """Shapes this thread's tiles: ``rows`` of sums and of A, all of W."""

    def codegen(context, builder, sig, args):
        # Palette 1: bytes of a row, 16 bits each, from byte 16 on; rows of each tile from byte 48 on.
        shapes = cgutils.alloca_once(builder, I32, size=16)
        rows = builder.trunc(args[0], I32)
        of_sums = builder.mul(rows, I32(0x01010101))
        of_a = builder.or_(rows, I32(ROWS << 8 | ROWS << 16 | ROWS << 24))
        words = [I32(1), *[I32(0)] * 3, *[I32(64 << 16 | 64)] * 4, *[I32(0)] * 4, of_sums, of_a, *[I32(0)] * 2]
        for i, word in enumerate(words):
            builder.store(word, builder.gep(shapes, [I64(i)], source_etype=I32))
        llvm_call(builder, "llvm.x86.ldtilecfg", VOID, [shapes])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _release(typingctx):
    def codegen(context, builder, sig, args):
        llvm_call(builder, "llvm.x86.tilerelease", VOID, [])
        return context.get_dummy_value()

    return types.void(), codegen


@functools.cache
def tile_state(variant: Variant) -> tuple[Any, Any]:
    """For kernels: (``shape_tiles(rows)``, ``release_tiles()``), which do nothing where products use no tiles.

    ``rows``: the most that a block has until the next call.  Tiles of fewer rows load and store less.
    """
    used = variant.products.tiled and not variant.products.emulated

    @inline
    def shape_used(rows):
        _shape(max(1, min(rows, ROWS)))  # a tile of no rows is a fault

    @inline
    def shape_none(rows):
        pass

    @inline
    def release_used():
        _release()

    @inline
    def release_none():
        pass

    return (shape_used, release_used) if used else (shape_none, release_none)
