"""The Numba kernels and their host code; ``backend.py`` answers the contract of :mod:`lstmcore.kernels`.

The modules, each importing only from those above it::

    process             native threads, forks              buffers       memory that is reused
    caches, products, tiling   instructions, block sizes and plans, from dtype, shape and machine
    jit                 compiling, and the cache on disk   vector        LLVM's vectors in Numba
    memory, activations, mode, simd                        what kernels do with vectors
    arguments           argument structs of kernels        variant       compile-time parameters
    member, team, threads                                  the threads that run a launch
    sync, steps, copying                                   barriers; the order of steps; clearing and copying rows
    tiles, microkernel, pipeline, matmul                   products: of blocks, beside cells, and of any size
    forward, backward, jobs, statistics, peak, streaming   the kernels
    problem, prepared, segments, prepare                   a kind of call, for the host
    tensors, wavefront  what calls allocate; layers at once
    backend             the contract's functions           stepping      a stream, for the host

What decided this form, and what was tried, is in ``docs/notes/cpu-tuning.md``.

Launches.  One launch is one direction of one layer, in backward one part of its batch (``tiling.parts``); launches run
in parallel where threads allow.  T steps, B rows sorted so that row r is active where r < batch_sizes[t], I input, H
hidden, P what the recurrence carries (the projection, or H), U panels of ``lanes`` hidden units, padded sizes H' = U *
lanes and P' likewise, N tokens: (step, row) pairs; token n = row_starts[t] + r.  All addresses, strides and offsets are
in bytes.

Memory, in addition to the caller's tensors:

* ``h`` (2, B, P'): h_{t-1} and h_t, alternating, in the dtype of operands (``products.py``: the compute dtype, or
  bfloat16 in pairs); both start as h_0, so that rows that become active late (direction 1) start from it.  ``c``
  (B, H'): the cell state, updated in place.  Resets zero their rows.  The rows of different row groups are placed pages
  apart; each member's base addresses of ``h``, ``c`` and ``m`` already include the gaps before its own group.
* ``z`` (tokens of a chunk, U, 4, lanes): the projected input; the cell's sums start from it.  Training in the compute
  dtype projects directly into ``gates``, which the cell then overwrites while these cache lines are hot.
* ``gates`` (N, U, 4, lanes), in the caller's dtype, and ``cells`` (N, H'): saved for backward.
* ``dz`` (U, tokens of a chunk, 4, lanes): panel by panel, so that weight gradients read it contiguously.  k counts the
  tokens of a part.  Where terms are pairs, dh and dx read pairs of units and weight gradients pairs of tokens: the cell
  writes both, ``dz`` and ``dz_terms``.

Segments.  A launch computes the steps ``first`` to ``last``.  With ``layer.segment`` forward is one launch that keeps
no gates; it writes the h and c that enter each segment to ``borders_h`` (segments, B, P') and ``borders_c``.  Backward
then launches forward and backward by turns (``segments.py``): forward resumes from a border into gates and cells of one
segment, whose addresses are moved back so that tokens are counted as ever, and backward goes on where the launch
before it ended, in the middle of a chunk or not.  So no sum changes, and the bits are those of a call that kept all.

Wavefronts.  Where one layer cannot occupy the threads, the layers of a stack run at once (``wavefront.py``): launches
of one member each, for a layer and a range of steps, that wait for the launch before on the same layer and for the
same range of the layer below (in backward: above).

Denormal numbers count as zero in the kernels (float32: below 1.2e-38).  A vanishing gradient, such as a default LSTM's
if its loss reads the last step, becomes denormal on its way to zero and would stay so for tens of thousands of
multiplications at a hundred cycles each.

Partition.  A member of a launch owns a range of rows and a range of panels; ``sync`` has their barriers: one per step
if panels are divided (h_t has to be complete before step t + 1), else none in forward and two per chunk in backward,
three with a projection (none if a part has one member).  The partition never changes a sum, so the bits do not depend
on it.
"""
