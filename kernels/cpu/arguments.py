"""Argument structs of the kernels: a kernel gets the address of one, and both sides know its fields by name.

A struct is a NamedTuple of int64 (counts, bytes, addresses; 0 if absent).  The host makes one per member
(``prepare.py``); the kernel reads it once, at its start (``memory.make_read``), so that the compiler keeps the fields
in registers or on the stack and does not reload them after other writes.
"""

from __future__ import annotations

from typing import NamedTuple


class ForwardArgs(NamedTuple):
    """Arguments of one member of ``lstm_fwd_kernel`` (see the package): addresses, bytes, counts."""

    # outputs
    y: int  # of this direction, (N or T * B, P); 0: not wanted
    gates: int  # (N, U, 4, lanes); 0: not wanted
    cells: int  # (N, H'); 0: not wanted
    borders_h: int  # (segments, B, P'): the states that enter each segment of steps; with ``resume`` an input
    borders_c: int  # (segments, B, H')
    # state and scratch
    h: int  # (2, B, P') operands
    c: int  # (B, H')
    o: int  # (members, rows of a block, lanes): the output gate of the rows of a block; buffers of ``pipeline``
    m: int  # (B, H') operands: o tanh(c), before the projection; 0 without one
    sums: int  # (B, P'): h in the compute dtype, as a projection adds it up, where operands are pairs
    z: int  # see the package; 0: gates hold it
    x_stage: int  # (members, tokens of a chunk, I): rows of operands; 0: those of x are
    table: int  # (members, 2, tokens of a chunk) int64: addresses of x and z
    # inputs
    x: int
    w_x: int  # gate panels of W_ih
    w_h: int  # gate panels of W_hh
    w_r: int  # column panels of W_hr^T
    bias: int  # (U, 4, lanes)
    reset: int  # bytes; 0: none
    # sizes
    steps: int
    first: int  # steps ``first`` to ``last`` are computed, in the direction's order
    last: int
    turn: int  # of a wavefront: how many launches of this layer come before this one
    done: int  # how many launches of this layer have finished, an int64; 0: no wavefront
    done_before: int  # the same of the layer whose results this one reads; 0: none
    segment: int  # steps of a segment; 0: no borders
    resume: int  # 1: start from the border at ``first``; 0: from h and c, and write every border
    batch: int
    inputs: int
    hidden: int
    width: int  # P
    chunk: int
    chunk_tokens: int
    fused: int
    reverse: int
    batch_sizes: int  # (T,) int64; 0: B
    row_starts: int  # (T + 1,) int64; 0: t * B
    packed: int  # user tensors are indexed by row_starts[t], not by t
    # strides and offsets
    x_step: int
    x_rows: int  # (B,) int64 offsets
    stage_rows: int  # of x_stage
    y_step: int
    y_rows: int
    reset_step: int
    reset_rows: int
    h_rows: int  # (B,) int64 offsets in h
    h_half: int  # from h_{t-1} to h_t
    m_rows: int
    sums_rows: int
    # partition
    row_begin: int
    row_end: int
    panel_begin: int
    panel_end: int
    column_begin: int  # column panels of P
    column_end: int
    lockstep: int  # panels are divided among members: one barrier per step
    member: int
    members: int
    counter: int
    following: int  # the arguments that the same thread processes next; 0: none


class BackwardArgs(NamedTuple):
    """Arguments of one member of ``lstm_bwd_kernel``; see ``ForwardArgs``."""

    # outputs
    dx: int  # (N or T * B, I); 0: not wanted
    dw_x: int  # gate panels, of this part; 0: weights not wanted
    dw_h: int
    dw_r: int  # (column panels of P, H, panel); 0 without projection
    db: int  # (U, 4, lanes)
    norms: int  # (2, T, B, groups of NORM_PANELS panels) float64 sums of squares, zero where not active; 0: not wanted
    # state and scratch
    dh: int  # (B, P'): in: dL/dh_n, out: dL/dh_0
    dc: int  # (B, H'): in: dL/dc_n, out: dL/dc_0
    dm: int  # (B, H'); 0 without projection
    dz: int  # (U, tokens of a chunk, 4, lanes) operands
    dz_terms: int  # (U, terms of the tokens of a chunk, 4, lanes), terms over tokens; the same as dz unless paired
    dh_operands: int  # (B, P'); the same as dh unless paired; 0 without projection
    dh_chunk: int  # (column panels of P, terms of the tokens of a chunk, panel); 0 without projection
    # (strips of I, terms of the tokens of a chunk, columns of a strip), tiled (strips, groups, columns, terms of one)
    x_strips: int  # 0: no weights wanted
    h_strips: int  # h_{t-1}, likewise
    m_strips: int  # likewise
    m_stage: int  # (tokens of a chunk, H) of storage: o tanh(c)
    ones: int  # a strip of a column of ones; 0 unless paired
    dx_stage: int  # (tokens of a chunk, I): dx in the compute dtype; 0: dx has it already
    table: int  # (4, tokens of the terms of a chunk) int64: addresses of dx, x, h_{t-1} and m_t
    # inputs
    dy: int  # 0: none
    dcells: int  # (N, H') in the order of cells; 0: none
    gates: int
    cells: int
    x: int
    y: int
    h_0: int  # the user's, (B, P); 0: zeros
    c_0: int  # (B, H')
    zero: int  # zeros, as many as the widest row has
    w_h: int  # column panels of W_hh, k in gate order
    w_x: int  # column panels of W_ih, k in gate order
    w_r: int  # column panels of W_hr
    reset: int
    # sizes
    steps: int
    first: int  # steps ``first`` to ``last`` are computed, in the direction's order
    last: int
    turn: int  # of a wavefront: how many launches of this layer come before this one
    done: int  # how many launches of this layer have finished, an int64; 0: no wavefront
    done_before: int  # the same of the layer whose results this one reads; 0: none
    batch: int
    inputs: int
    hidden: int
    width: int
    chunk: int  # steps
    chunk_tokens: int
    chunk_borders: int  # of ragged rows: int64 first step of each chunk, in the direction's order; else 0
    chunks: int
    reverse: int
    batch_sizes: int
    row_starts: int
    packed: int
    part_begin: int  # rows of this part
    part_end: int
    part_starts: int  # (T + 1,) int64: tokens of the part before step t; 0: t * rows of the part
    # strides and offsets
    x_step: int
    x_rows: int
    y_step: int
    y_rows: int
    dx_step: int
    dx_rows: int
    dy_step: int
    dy_rows: int
    reset_step: int
    reset_rows: int
    h_rows: int
    m_rows: int
    h_0_rows: int
    dh_operand_rows: int
    panel_rows: int  # int64 offsets of the first rows of a panel of dz
    # partition
    row_begin: int
    row_end: int
    panel_begin: int
    panel_end: int
    column_begin: int
    column_end: int
    lockstep: int
    member: int
    members: int
    counter: int
    following: int  # the arguments that the same thread processes next; 0: none


class Head(NamedTuple):
    """Arguments of a launch on torch's team, common to its members (see ``team.py``)."""

    function: int  # the kernel's address
    arguments: int  # the members' argument structs, one after another
    stride: int  # bytes
    members: int
    thread_num: int  # addresses of the OpenMP runtime's functions
    num_threads: int
    size: int  # out: threads of the team
