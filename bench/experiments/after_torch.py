"""Each call behind an operation of torch's, as in any model: on a CPU the main figure.

The threads of torch's OpenMP runtime still spin then, waiting for more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench.cases import Case
from bench.measure import Experiment, Task, beside_torch, checked, timed
from bench.memory import peak_memory_mib
from bench.providers import OURS, PEER
from bench.rows import Row
from bench.timing import Effort, operation


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row a mode; that of training with the peak memory of a step, where that is wanted."""
    modes = task.modes(case)
    both = checked(case, modes, task.backend)
    for mode in modes:
        samples = timed(case, getattr(both.ours, mode), getattr(both.peer, mode), task.effort, operation)
        row = beside_torch("after-torch", case, mode, samples, both, task)
        if task.effort.memory and "memory" in case.tags and mode == "training":
            memory, peer_memory = (peak_memory_mib(case, provider, task.backend) for provider in (OURS, PEER))
            row = replace(row, memory_mib=memory, peer_memory_mib=peer_memory)
        yield row


AFTER_TORCH = Experiment(
    name="after-torch",
    what="each call behind an operation of torch's, as in a model: ours beside torch's LSTM, with peak memory",
    times="a call",
    measure=measure,
    full={"cpu": Effort(7, 6.0, memory=True)},
    quick={"cpu": Effort(5, 1.5)},
)
