"""Device functions for iterating over steps, rows and blocks.

Row r of the sorted batch is active at step t where ``r < batch_sizes[t]``; n is the index of a token.
"""

from __future__ import annotations

from .jit import inline
from .memory import load_byte, load_int


@inline
def active_rows(batch_sizes, batch, t):
    """Number of active rows at step t."""
    return load_int(batch_sizes + 8 * t) if batch_sizes != 0 else batch


@inline
def row_start(row_starts, batch, t):
    """n of row 0 at step t: the tokens before step t."""
    return load_int(row_starts + 8 * t) if row_starts != 0 else t * batch


@inline
def user_index(packed, row_starts, batch, t):
    """Index of step t in a user's tensor."""
    return row_start(row_starts, batch, t) if packed != 0 else t


@inline
def walk(reverse, steps, s):
    """The step that is s-th in the direction's order."""
    return steps - 1 - s if reverse != 0 else s


@inline
def resets(a, index, r):
    """Whether row r is reset at the step with this ``index`` in the user's tensors."""
    return a.reset != 0 and load_byte(a.reset + index * a.reset_step + load_int(a.reset_rows + 8 * r)) != 0


@inline
def block_size(rows, most):
    """Rows of the next block, if ``rows`` are divided into few and equal blocks of at most ``most``."""
    return -(-rows // (-(-rows // most)))
