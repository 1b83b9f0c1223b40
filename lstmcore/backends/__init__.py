"""Which backend runs a call: ``registry`` has an entry for each, ``rules`` what was measured, ``choice`` decides.

``triton`` and ``numba`` are the fused kernels of :mod:`lstmcore.kernels`; ``torch`` hands the whole call to ATen's
LSTM (``aten``), exactly as ``torch.nn.LSTM`` does; ``reference`` is the plain step loop.
"""

from lstmcore.backends.choice import Choice, Situation, choose, in_graph, own_cell, plan
from lstmcore.backends.registry import AUTO, REFERENCE, REGISTRY, Backend, check_name, load, names

__all__ = [
    "AUTO", "REFERENCE", "REGISTRY", "Backend", "Choice", "Situation", "check_name", "choose", "in_graph", "load",
    "names", "own_cell", "plan",
]  # fmt: skip
