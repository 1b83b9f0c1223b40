"""The Numba kernels and their host code; ``backend.py`` answers the contract of :mod:`lstmcore.kernels`.

The rooms, each knowing only those above it::

    process             native threads, forks              buffers       memory that is used again
    caches, tiling      block sizes and plans, from shape and machine
    jit                 compiling, and the cache on disk   vector        LLVM's vectors in Numba
    memory, activations, mode, simd                        what kernels do with vectors
    arguments           records: what a kernel is told     variant       what a kernel is compiled for
    member, team, threads                                  whose threads run a launch
    sync, steps, rows                                      waiting for one another; walking; clearing and copying
    microkernel, matmul                                    products: blocks in registers, and of any size
    forward, backward, jobs, statistics, peak              the kernels
    problem, layout     a kind of call, for the host       backend       the contract's five functions

What decided this form, and what was tried, is in ``docs/notes/cpu-tuning.md``.

Launches.  One launch is one direction of one layer, in backward one part of its batch (``tiling.parts``); launches run
side by side where threads allow.  T steps, B rows sorted so that row r is alive where r < batch_sizes[t], I input, H
hidden, P what the recurrence carries (the projection, or H), U panels of ``lanes`` hidden units, padded sizes H' = U *
lanes and P' likewise.  N counts (step, row) pairs; n = row_starts[t] + r.  All addresses, strides and offsets are in
bytes.

Memory, beside the tensors of the caller:

* ``h`` (2, B, P'): h_{t-1} and h_t, by turns, in the compute dtype; both start as h_0, so a row that comes to life late
  (direction 1) finds it.  ``c`` (B, H'): the cell state, updated in place.  Resets zero their rows.  The rows of
  different row groups lie pages apart; each member is given ``h``, ``c`` and the like as if all lay as its own do.
* ``z`` (rows of a chunk, U, 4, lanes): the projected input; the cell's sums start from it.  Training in the compute
  dtype projects straight into ``gates``, which the cell then overwrites: the same lines, hot.
* ``gates`` (N, U, 4, lanes), in the caller's dtype, and ``cells`` (N, H'): saved for backward.
* ``dz`` (U, rows of a chunk, 4, lanes): panel by panel, so that weight gradients read it straight through.  Row k of
  a chunk of a part counts the (step, row) pairs of that part.

Denormal numbers count as zero inside (float32: below 1.2e-38).  A vanishing gradient, which is what a default LSTM's is
when its loss reads the last step, passes through them on its way to zero and would stay there for tens of thousands of
multiplications at a hundred cycles each.

Sharing.  A member of a launch owns a range of rows and a range of panels; ``sync`` keeps members together: once a step
where panels are shared out (h_t has to be whole before step t + 1), else not at all in forward and twice a chunk in
backward (where a part has one member: never).  Who owns what never changes a sum, so the bits do not depend on it.
"""
