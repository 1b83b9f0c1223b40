"""Each call on its own, after a pause: ours beside ``torch.nn.LSTM``, and in a block of its own onnxruntime's LSTM.

On a GPU this is the main figure.  On a CPU torch's threads are asleep by then, as in no model: see ``after_torch``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bench import costs, onnx_peer, tables
from bench.cases import Case
from bench.measure import Experiment, Task, beside_torch, checked, quantiles, timed
from bench.memory import gpu_peak_mib
from bench.rows import Row
from bench.timing import Effort


def measure(case: Case, task: Task) -> Iterator[Row]:
    """The rows of a case: beside torch, and where onnxruntime covers it beside that."""
    modes, effort = task.modes(case), task.effort
    both = checked(case, modes, task.backend)
    for mode in modes:
        samples = timed(case, getattr(both.ours, mode), getattr(both.peer, mode), effort)
        row = beside_torch("speed", case, mode, samples, both, task)
        if case.device == "cuda" and effort.memory and "memory" in case.tags and mode == "training":
            row = replace(row, memory_mib=gpu_peak_mib(both.ours), peer_memory_mib=gpu_peak_mib(both.peer))
        yield row
        if onnx_peer.covers(case, mode) and onnx_peer.missing() is None:
            less = effort.less
            seconds = onnx_peer.seconds(
                both.peer.module,
                both.problem,
                both.peer.inference(),
                min_samples=less.min_pairs,
                budget_s=less.budget_s,
            )
            unpaired = dict.fromkeys(("pair_ratio", "pair_ratio_p20", "pair_ratio_p80"))
            peer = {"peer": onnx_peer.NAME, "peer_backend": onnx_peer.NAME, **quantiles(seconds, "peer_")}
            yield replace(row, pairs=len(seconds), **peer, **unpaired)


SPEED = Experiment(
    name="speed",
    what="each call alone, after a pause: ours beside torch's LSTM, and in float32 inference beside onnxruntime's",
    times="a call",
    measure=measure,
    full={"cpu": Effort(7, 6.0), "cuda": Effort(7, 1.0, memory=True)},
    quick={"cpu": Effort(5, 1.5), "cuda": costs.QUICK},
    seconds=costs.predicted_s,
    key_figures=tables.key_figures,
)
