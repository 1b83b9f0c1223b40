"""Backends of one LSTM layer.  Installed as ``lstmcore.kernels``; knows arrays and launches, but no modules.

The contract
------------
A backend computes one layer of an LSTM, in one direction or both, over a batch of ragged rows.  It is a module with
five functions; the types they exchange are in :mod:`lstmcore.kernels.contract`.  It may have a
sixth, ``describe(layer: Layer) -> str``, which says how such a layer would run, as text for users.

* ``supports(layer: Layer) -> str | None``:
  None if the backend runs such a layer on this machine; otherwise one sentence saying what is missing and what would
  help.  Cheap: it compiles nothing.
* ``forward(call: Call, *, save, cells) -> Forward``:
  the whole layer, input projection included (so that a backend may fuse it).  With ``save=False`` (inference) nothing
  is kept for a backward; with ``save=True`` the result has everything that ``backward`` needs.
* ``backward(call: Call, grads: GradOutputs, output, saved, needs: Needs) -> Gradients``:
  the gradients of everything that ``needs`` asks for, from the gradients of what forward returned (None: of a result
  that was not used), forward's call, its ``output`` and what it ``saved``.
* ``saves(layer: Layer, room: int) -> list[tuple[tuple[int, ...], torch.dtype]]``:
  shape and dtype of each tensor that ``forward`` saves for such a layer, with room for ``room`` tokens, a number that
  may be symbolic.
* ``prewarm(layer: Layer, *, training) -> None``:
  compiles what such a layer needs, so that the first call does not wait.

It may ask to be checked against the reference on a device before ``"auto"`` takes it there, with two more functions:

* ``kernels(layer: Layer) -> Kernels``: which compiled kernels such a layer runs, so that one check is for all layers
  that run them, and how they round.  Cheap: it compiles nothing.
* ``settle(device: torch.device) -> None``: waits for what was called on the device, and raises an error that it left
  for a later call.

It may also run a stack of layers at once, where one layer cannot occupy the machine, with three more functions:

* ``stacks(layer: Layer, num_layers: int) -> bool``: whether that is worth it; ``layer``: the second of the stack.  In
  training it has the same answer on any number of threads (see ``torch.utils.checkpoint``).
* ``forward_stack(calls: Sequence[Call], *, save) -> list[Forward]``: the layers of a stack of one direction, dense and
  without segments.  ``input`` of the first call is the input; those of the others are not read.
* ``backward_stack(calls, grads, results, needs) -> list[Gradients]``: from the same calls (each with its input), the
  gradients of h_n and c_n of every layer and of the output of the last, and what forward returned; ``needs`` of every
  layer, of which all but the first need ``input``.

Legend: T time, B batch, N tokens: (step, row) pairs, T * B if dense, else the sum of the lengths, I input, H hidden,
P projection (H without one), D directions (1 or 2; direction 1 walks time backwards).

What is computed, per direction, in PyTorch's gate order i, f, g, o:

    z_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
    i, f, o = sigmoid(z^i), sigmoid(z^f), sigmoid(z^o)
    g = tanh(z^g)
    c_t = f c_{t-1} + i g
    h_t = o tanh(c_t)                   with a projection: h_t = W_hr (o tanh(c_t))

Rows.  A row is one sequence of the batch; it is active at the steps that it has.  ``rows`` says which rows are active
at each step, and how tensors are laid out: padded ``(T, B, ·)`` of any strides with any lengths, or packed ``(N, ·)``.
A backend does no work for padding.  Padded positions of the outputs are zero.  Results of a row depend neither on the
values of the other rows of the batch nor on the number of threads; on the CPU not on the number of rows either (on a
GPU that decides the tiles, and so the order of sums).

Resets.  ``reset`` (bool, shaped like input without its last dimension) zeroes h and c of a row *before* step t
computes: the state that enters that step is zero, and no gradient passes through it.  Direction 1 resets before it
computes step t too, that is, between step t + 1 and step t.

Cells.  ``cells=True`` also returns every c_t, in the state dtype; ``grads.cells`` is their gradient.

Norms.  ``needs.norms`` makes backward also return, per direction, step and row, the Euclidean norms of the gradients
that arrive at h_t and at c_t (shape ``(2, D, T, B)``; first h, then c): as exact as the gradients themselves, however
small these are.  ``needs.gate_rows = R`` makes it return ``GateStatistics`` over R rows, evenly spread over the
batch.  Both cost nothing if off.

Segments.  ``layer.segment = S`` asks forward to save, in place of what backward needs of all steps, the states that
enter each segment of S steps of a direction (in its order), and backward to compute the rest again, one segment at a
time from the last to the first.  What it returns is the same: in the CPU kernels bit for bit, in the Triton kernels up
to a rounding to the dtype where two segments meet (never that of the cell state).  A backend that ignores the wish is
correct, and takes the memory.

Dtypes.  float32, float64, bfloat16, float16; all tensors of a call share one.  The cell state and every accumulation
are float32 for the 16-bit types; ``state_dtype`` in ``contract`` says so.

Allocation.  A backend allocates all that it returns; its ``saved`` tensors belong to the graph of the caller, which
must keep them unchanged between forward and backward, and may call backward more than once.  It never writes to its
inputs and keeps no reference to a tensor after it returns; it may keep scratch memory and reuse it.

Non-finite values propagate as in the formula; they never hang a kernel.
"""

if __name__ != "lstmcore.kernels":
    raise ImportError(
        f"the kernels were imported as {__name__!r}, but they are the package 'lstmcore.kernels': "
        "install the project (pip install -e .) and use `import lstmcore`; do not put the repository's root on sys.path"
    )
