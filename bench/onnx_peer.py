"""onnxruntime's LSTM, a second peer: dense float32 inference on a CPU, from the weights of a ``torch.nn.LSTM``.

The threads of its pool spin between calls and take the cores from whoever runs next.  So it does not alternate with the
other two: it is timed in a block of calls of its own, set up as a user meets it (spinning allowed, the default), and
its session is closed, which ends its threads, before anything else is timed.

The model is written node by node, since an export would measure the exporter too.

Legend: T steps, B batch, I input, H hidden, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.providers import Problem
from bench.timing import repeat
from bench.verify import check_outputs

NAME = "onnxruntime"
INSTALL = "pip install onnxruntime onnx"
# of the same age: any runtime of the last years loads them, whatever ``onnx`` writes by default
OPSET, IR_VERSION = 14, 7


def missing() -> str | None:
    """Why nothing can be measured, and what to do about it; None where both packages are there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"{NAME} is skipped, its columns stay empty: {error} ({INSTALL})"
    return None


def covers(case: Case, mode: str) -> bool:
    """Whether the operator does what the case asks for; onnxruntime has it in float32 only, and without projection."""
    dense = not case.ragged and not case.proj_size
    return mode == "inference" and case.device == "cpu" and case.dtype == "float32" and dense


def _ordered(parameter: Tensor) -> Tensor:
    """The gates i, f, g, o of torch in ONNX's order i, o, f, g: (4H, ·)."""
    i, f, g, o = parameter.detach().chunk(4)
    return torch.cat([i, o, f, g])


def _weights(module: nn.LSTM, layer: int) -> Iterator[tuple[str, Tensor]]:
    """The inputs W (D, 4H, I), R (D, 4H, H) and B (D, 8H) of a layer's node."""
    suffixes = ("", "_reverse") if module.bidirectional else ("",)

    def stacked(name: str) -> Tensor:
        return torch.stack([_ordered(getattr(module, f"{name}_l{layer}{suffix}")) for suffix in suffixes])

    yield "W", stacked("weight_ih")
    yield "R", stacked("weight_hh")
    if module.bias:
        yield "B", torch.cat([stacked("bias_ih"), stacked("bias_hh")], 1)


def model_of(module: nn.LSTM) -> Any:
    """The module as an ``onnx.ModelProto``: input, h_0, c_0 to output, h_n, c_n, in torch's shapes."""
    from onnx import TensorProto, helper, numpy_helper

    layers, directions, hidden = module.num_layers, 2 if module.bidirectional else 1, module.hidden_size
    constants = {
        "split": torch.full((layers,), directions),
        "shape": torch.tensor([0, 0, directions * hidden]),  # a zero keeps what is there
    }
    ends = {name: [f"{name}_{layer}" for layer in range(layers)] for name in ("h_0", "c_0", "h_n", "c_n")}
    nodes = [helper.make_node("Split", [name, "split"], ends[name], axis=0) for name in ("h_0", "c_0")]
    rows = "input"  # (T, B, I), then (T, B, D * H)
    for layer in range(layers):
        weights = {f"{name}_{layer}": tensor for name, tensor in _weights(module, layer)}
        constants |= weights
        w, r, *b = weights
        nodes += [
            helper.make_node(
                "LSTM",
                # Between the bias and the states: lengths, which all rows have in common.
                [rows, w, r, *(b or [""]), "", ends["h_0"][layer], ends["c_0"][layer]],
                [f"Y_{layer}", ends["h_n"][layer], ends["c_n"][layer]],  # (T, D, B, H), (D, B, H), (D, B, H)
                hidden_size=hidden,
                direction="bidirectional" if module.bidirectional else "forward",
            ),
            helper.make_node("Transpose", [f"Y_{layer}"], [f"by_row_{layer}"], perm=[0, 2, 1, 3]),
        ]
        rows = "output" if layer == layers - 1 else f"rows_{layer}"
        nodes.append(helper.make_node("Reshape", [f"by_row_{layer}", "shape"], [rows]))
    nodes += [helper.make_node("Concat", ends[name], [name], axis=0) for name in ("h_n", "c_n")]

    def declare(name: str, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    states = (layers * directions, "B", hidden)
    graph = helper.make_graph(
        nodes,
        "lstm",
        [declare("input", "T", "B", module.input_size), declare("h_0", *states), declare("c_0", *states)],
        [declare("output", "T", "B", directions * hidden), declare("h_n", *states), declare("c_n", *states)],
        [numpy_helper.from_array(tensor.contiguous().numpy(), name) for name, tensor in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def step_model_of(module: nn.LSTM) -> Any:
    """One step of the module as an ``onnx.ModelProto`` of LSTM nodes alone: input (1, B, I), and h and c of each layer,
    to those after the step, (1, B, H); the last layer's h is the output.
    """
    from onnx import TensorProto, helper, numpy_helper

    def declare(name: str, width: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, "B", width))

    nodes, constants, states, rows = [], {}, [], "input"
    for layer in range(module.num_layers):
        weights = {f"{name}_{layer}": tensor for name, tensor in _weights(module, layer)}
        constants |= weights
        w, r, *b = weights
        before, after = ([f"{name}_{layer}" for name in pair] for pair in (("h_0", "c_0"), ("h_n", "c_n")))
        given = [rows, w, r, *(b or [""]), "", *before]
        nodes.append(helper.make_node("LSTM", given, ["", *after], hidden_size=module.hidden_size))
        states.append((before, after))
        rows = after[0]
    ends = [[declare(name, module.hidden_size) for pair in states for name in pair[end]] for end in (0, 1)]
    initial = [numpy_helper.from_array(tensor.contiguous().numpy(), name) for name, tensor in constants.items()]
    graph = helper.make_graph(nodes, "step", [declare("input", module.input_size), *ends[0]], ends[1], initial)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


class Session:
    """The module in onnxruntime, on one problem.  Its threads live as long as this does."""

    def __init__(self, module: nn.LSTM, problem: Problem) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            model_of(module).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        h_0, c_0 = problem.hx
        self._feed = {"input": problem.input.numpy(), "h_0": h_0.numpy(), "c_0": c_0.numpy()}

    def inference(self) -> list[Any]:
        """The outputs as numpy arrays: of all rows, then the final states."""
        return self._session.run(None, self._feed)

    def outputs(self) -> tuple[Tensor, ...]:
        """The same as tensors."""
        return tuple(map(torch.from_numpy, self.inference()))


def seconds(
    module: nn.LSTM, problem: Problem, expected: tuple[Tensor, ...], *, min_samples: int, budget_s: float
) -> tuple[float, ...]:
    """Seconds a call, after a check against what torch returns; raises Mismatch where it fails."""
    session = Session(module, problem)  # goes with this function's frame, before the others are timed again
    check_outputs(problem.case, NAME, session.outputs(), expected)
    return repeat(session.inference, min_samples=min_samples, budget_s=budget_s)
