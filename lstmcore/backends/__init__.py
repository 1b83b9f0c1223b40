"""Which backend runs a call: ``registry`` has an entry for each, ``rules`` the measured rules, ``choice`` decides.
``self_check`` compares kernels with the reference before ``"auto"`` takes them on a device.

``triton`` and ``numba`` are the fused kernels of :mod:`lstmcore.kernels`; ``torch`` passes the whole call to ATen's
LSTM (``aten``), exactly as ``torch.nn.LSTM`` does; ``reference`` is the plain step loop.
"""

from lstmcore.backends.choice import Choice, Situation, choose, chosen, forget, in_graph, own_cell, runs_in_graph
from lstmcore.backends.registry import AUTO, REFERENCE, REGISTRY, Backend, check_name, load, names

__all__ = [
    "AUTO", "REFERENCE", "REGISTRY", "Backend", "Choice", "Situation", "check_name", "choose", "chosen", "forget",
    "in_graph", "load", "names", "own_cell", "runs_in_graph",
]  # fmt: skip
