"""Which backend runs a call: ``registry`` has an entry for each, ``rules`` says which was measured faster, ``choice``
decides.  ``tuning`` has the tables of timings, by ``timings``' arithmetic and for a ``machine``.
``self_check`` compares kernels with the reference before ``"auto"`` takes them on a device.

``triton`` and ``numba`` are the fused kernels of :mod:`lstmcore.kernels`; ``torch`` passes the whole call to ATen's
LSTM (``aten``), exactly as ``torch.nn.LSTM`` does; ``reference`` is the plain step loop.
"""

from lstmcore.backends.choice import Choice, choose, chosen, forget, in_graph, own_cell, runs_in_graph
from lstmcore.backends.registry import AUTO, REFERENCE, REGISTRY, Backend, check_name, load, names
from lstmcore.backends.situation import Situation
from lstmcore.backends.timings import Verdict

__all__ = [
    "AUTO", "REFERENCE", "REGISTRY", "Backend", "Choice", "Situation", "Verdict", "check_name", "choose", "chosen",
    "forget", "in_graph", "load", "names", "own_cell", "runs_in_graph",
]  # fmt: skip
