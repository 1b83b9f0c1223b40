"""The latency of single steps, each of which waits for the one before: control, audio, trading.

One stream of steps, the state carried from one to the next.  Ours is ``lstmcore.Stream`` with tensors, beside torch's
LSTM and LSTMCell, and with NumPy's arrays, beside onnxruntime: with one thread, and with as many as it takes itself.
Everyone is timed in a block of steps of their own, step by step, in one process; onnxruntime's threads spin, so its
sessions are closed before the next block.  Outputs are checked first against float64.

Legend: B batch, I input, H hidden, L layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

import lstmcore
from bench import onnx_peer, tables, verify
from bench.cases import Case
from bench.measure import Experiment, Task, quantiles, row_of
from bench.providers import OURS, Problem, arguments, draw
from bench.rows import SPEED, Row
from bench.timing import Effort, percentile
from bench.verify import FACTOR, relative_error

INPUTS = 64  # different steps, which are repeated
Step = Callable[[Any], Any]  # the output of an input; keeps the state


def ours(module: nn.LSTM, batch: int) -> lstmcore.Stream:
    return lstmcore.Stream(module, batch)


def torchs_lstm(module: nn.LSTM, batch: int) -> Step:
    """``torch.nn.LSTM`` over one step."""
    state: Any = None

    def step(x: Tensor) -> Tensor:
        nonlocal state
        with torch.inference_mode():
            output, state = module(x[None], state)
        return output[0]

    return step


def torchs_cell(module: nn.LSTM, batch: int) -> Step:
    """``torch.nn.LSTMCell``."""
    cell = nn.LSTMCell(module.input_size, module.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    state: Any = None

    def step(x: Tensor) -> Tensor:
        nonlocal state
        with torch.inference_mode():
            state = cell(x, state)
        return state[0]

    return step


def onnxruntimes(module: nn.LSTM, batch: int, threads: int | None) -> Step:
    """A session of nothing but LSTM nodes, whose states go out and in again; ``threads``: None for its default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    model = onnx_peer.step_model_of(module).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    feed = {each.name: np.zeros((1, batch, module.hidden_size), np.float32) for each in session.get_inputs()[1:]}

    def step(x: np.ndarray) -> np.ndarray:
        feed["input"] = x[None]
        states = session.run(names, feed)
        feed.update(zip(list(feed)[: len(names)], states, strict=True))
        return states[-2][0]  # h of the last layer

    return step


def peers(case: Case) -> dict[str, tuple[str, Callable[[nn.LSTM, int], Step]]]:
    """By name: what they take, "tensors" or "arrays", and how they are made."""
    found: dict[str, tuple[str, Callable[[nn.LSTM, int], Step]]] = {"torch.nn.LSTM": ("tensors", torchs_lstm)}
    if case.num_layers == 1:
        found["torch.nn.LSTMCell"] = "tensors", torchs_cell
    if onnx_peer.missing() is None:
        found["onnxruntime, 1 thread"] = "arrays", lambda module, batch: onnxruntimes(module, batch, 1)
        found["onnxruntime"] = "arrays", lambda module, batch: onnxruntimes(module, batch, None)
    return found


def latencies(step: Step, inputs: Sequence[Any], steps: int) -> tuple[float, ...]:
    """Seconds of each of so many steps, after some that are not counted."""
    clock, count, times = time.perf_counter_ns, len(inputs), []
    for index in range(-min(steps, 500), steps):
        x = inputs[index % count]
        begin = clock()
        step(x)
        end = clock()
        if index >= 0:
            times.append((end - begin) * 1e-9)
    return tuple(times)


def outputs(step: Step, inputs: Sequence[Any]) -> Tensor:
    """(T, B, H) of the first steps."""
    return torch.stack([torch.as_tensor(step(x)).clone() for x in inputs])


class Judge:
    """Float64's outputs of the first steps, and the error that is allowed: by torch's own in float32."""

    def __init__(self, problem: Problem, module: nn.LSTM) -> None:
        exact, self._case = nn.LSTM(**arguments(problem.case), dtype=torch.float64), problem.case
        exact.load_state_dict(problem.weights)
        with torch.no_grad():
            self._expected, mine = exact(problem.input.double())[0], module(problem.input)[0]
        floor = verify.FLOOR_EPS[torch.float32] * torch.finfo(torch.float32).eps
        self._bound = FACTOR * relative_error(mine, self._expected) + floor

    def error(self, name: str, got: Tensor) -> float:
        """How far these outputs are off; raises Mismatch if too far."""
        what = f"{self._case.name}, {name}"
        return verify.compare(what, ["output"], [got], [self._expected], [self._bound], "float64 torch")


def weight_bytes(case: Case) -> int:
    """What a step reads at least: the weights of all layers, in float32."""
    later = (case.num_layers - 1) * 2 * case.hidden_size
    return 4 * 4 * case.hidden_size * (case.input_size + case.hidden_size + later)


def measure(case: Case, task: Task) -> Iterator[Row]:
    """A row a peer."""
    problem = draw(case, steps=INPUTS)
    module = nn.LSTM(**arguments(case)).requires_grad_(False).eval()
    module.load_state_dict(problem.weights)
    steps, judge = min(case.steps, task.effort.min_pairs), Judge(problem, module)
    inputs = {"tensors": list(problem.input), "arrays": [x.numpy() for x in problem.input]}
    mine, errors = {}, []
    for kind, each in inputs.items():
        stream = ours(module, case.batch)
        errors.append(judge.error(f"{OURS} with {kind}", outputs(stream.step, each)))
        time.sleep(0.02)  # threads of the block before go to sleep
        mine[kind] = latencies(stream.step, each, steps)
    for name, (kind, make) in peers(case).items():
        step = make(module, case.batch)
        judge.error(name, outputs(step, inputs[kind]))
        time.sleep(0.02)
        theirs = latencies(step, inputs[kind], steps)
        del step  # and with a session its threads
        times = quantiles(mine[kind]) | quantiles(theirs, "peer_")
        tails = {"p99_us": percentile(mine[kind], 0.99) * 1e6, "peer_p99_us": percentile(theirs, 0.99) * 1e6}
        rate = {"weights_gb_s": weight_bytes(case) / times["p50_ms"] / 1e6}
        yield row_of(
            "stream", case, "inference", variant=kind, backend=stream.backend, peer=name, pairs=steps, **times,
            kind=SPEED, pair_ratio=times["peer_p50_ms"] / times["p50_ms"], gflops=case.flops("inference")
            / case.steps / times["p50_ms"] / 1e6, max_error=max(errors), reference="float64",
            details={key: f"{value:.4g}" for key, value in (tails | rate).items()},
        )  # fmt: skip


def show(console: Console, rows: Sequence[Row]) -> None:
    """Every case beside every peer, in microseconds."""
    figures = ("p50", "p99", "peer's p50", "peer's p99", "speed", "GB/s")
    title = f"a step in µs: {rows[0].device}, {tables.counted(rows[0])}, torch {rows[0].torch}"
    table = tables.grid(title, ("case", "fed with", "peer"), figures, "GB/s: of weights, at our median")
    for row in rows:
        table.add_row(
            row.case, row.variant, row.peer, f"{row.p50_ms * 1e3:.2f}", row.details["p99_us"],
            f"{(row.peer_p50_ms or 0) * 1e3:.2f}", row.details["peer_p99_us"], tables.speed(row.speed),
            row.details["weights_gb_s"],
        )  # fmt: skip
    console.print(table)


def key_figures(rows: Sequence[Row]) -> str:
    lowest = min(rows, key=lambda row: row.speed)
    return f"a step is at least {lowest.speed:.2f} times as fast as the peer's ({lowest.case}, {lowest.peer})"


STREAM = Experiment(
    name="stream",
    what="the latency of single steps, each after the one before: ours beside torch's and onnxruntime's",
    times="a step",
    measure=measure,
    full={"cpu": Effort(10_000, 0.0)},
    quick={"cpu": Effort(2_000, 0.0)},
    details={
        "p99_us": "the 99th percentile of ours",
        "peer_p99_us": "and of the peer's",
        "weights_gb_s": "the weights over our median",
    },
    show=show,
    key_figures=key_figures,
    whole=True,
)
