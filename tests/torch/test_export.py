"""Models with the module in them, taken out of Python: torch.export, AOTInductor, ONNX.

Exported with a number of steps and rows that stay open, and run at others.  The judge is torch.nn.LSTM, one row alone
after the other; where the module has more than that one, the module itself, uncompiled, bit for bit.

T time, B batch, I input, H hidden, P projection (H where there is none), L layers, D directions.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import lstmcore

from ..support.tolerances import ORDER_OF_SUMS, ORDER_OF_SUMS_F32, error
from ..support.toolchain import needs_cpp

F64 = torch.float64
I, H = 3, 5
EXPORTED, OTHERS = (6, 4), ((9, 3), (2, 5), (1, 1))  # T and B
DEEP = {"num_layers": 2, "bidirectional": True}
EVERYTHING = {**DEEP, "proj_size": 2, "dropout": 0.5, "batch_first": True}


class Model(nn.Module):
    """What a user exports: a module that holds the LSTM and calls it."""

    def __init__(self, hidden_size: int = H, return_cells: bool = False, **options: Any) -> None:
        super().__init__()
        self.rnn = lstmcore.LSTM(I, hidden_size, **options)
        self.more = {"return_cells": True} if return_cells else {}

    def forward(
        self,
        x: Tensor,  # (T, B, I), (B, T, I) when batch_first
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Any, ...]:
        return self.rnn(x, hx, lengths=lengths, reset=reset, **self.more)


def arguments(model: Model, named: tuple[str, ...], T: int, B: int) -> dict[str, Any]:
    """x, and what else ``named`` says, for T steps and B rows; some of these are of no steps."""
    rnn = model.rnn
    like, widths = rnn.weight_ih_l0, (rnn.proj_size or rnn.hidden_size, rnn.hidden_size)
    states, shape = rnn.num_layers * (1 + rnn.bidirectional), (B, T) if rnn.batch_first else (T, B)
    hx = tuple(torch.randn(states, B, width, dtype=like.dtype) for width in widths)
    lengths = torch.randint(0, T + 1, (B,))
    lengths[0] = 0 if B > 1 else T
    drawn = {"hx": hx, "lengths": lengths, "reset": torch.rand(shape) < 0.3}
    return {"x": torch.randn(*shape, I, dtype=like.dtype)} | {name: drawn[name] for name in named}


def dynamic(model: Model, named: tuple[str, ...]) -> dict[str, Any]:
    """Which dimensions of the arguments stay open: all of time and batch."""
    T, B = Dim("T"), Dim("B")
    rows = {0: B, 1: T} if model.rnn.batch_first else {0: T, 1: B}
    shapes = {"x": rows, "hx": ({1: B}, {1: B}), "lengths": {0: B}, "reset": rows}
    return {name: shapes[name] for name in ("x", *named)}


def exported(model: Model, named: tuple[str, ...] = (), strict: bool = False) -> ExportedProgram:
    shapes = dynamic(model, named)
    return torch.export.export(model, (), arguments(model, named, *EXPORTED), dynamic_shapes=shapes, strict=strict)


def layers(program: ExportedProgram) -> int:
    """How many nodes of the graph are layers."""
    return sum(node.target is torch.ops.lstmcore.layer.default for node in program.graph.nodes)


def same_bits(got: Any, expected: Any) -> None:
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert one.shape == other.shape
        assert torch.equal(one, other)


def by_torch(
    model: Model, x: Tensor, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
) -> list[Tensor]:
    """output, h_n, c_n of torch.nn.LSTM in float64, with the model's weights: every row alone, cut to its length."""
    rnn = model.rnn
    options = {"proj_size": rnn.proj_size, "bidirectional": rnn.bidirectional, "bias": rnn.bias, "dtype": F64}
    theirs = nn.LSTM(I, rnn.hidden_size, rnn.num_layers, **options)
    theirs.load_state_dict(rnn.state_dict())
    x = (x.transpose(0, 1) if rnn.batch_first else x).double()
    T, B, _ = x.shape
    states = rnn.num_layers * (1 + rnn.bidirectional)
    h_n, c_n = hx or [x.new_zeros(states, B, width) for width in (rnn.proj_size or rnn.hidden_size, rnn.hidden_size)]
    h_n, c_n = h_n.to(F64, copy=True), c_n.to(F64, copy=True)
    output = x.new_zeros(T, B, h_n.shape[2] * (1 + rnn.bidirectional))
    for b, steps in enumerate([T] * B if lengths is None else lengths.tolist()):
        if steps:
            row = slice(b, b + 1)
            output[:steps, row], (h_n[:, row], c_n[:, row]) = theirs(x[:steps, row], (h_n[:, row], c_n[:, row]))
    return [output.transpose(0, 1) if rnn.batch_first else output, h_n, c_n]


def close(got: Any, expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(tree_leaves(got), expected, strict=True):
        assert error(one.double(), other) <= tolerance * max(1.0, other.abs().max().item())


# torch.export


CALLS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "states": (DEEP, ("hx",)),
    "lengths": ({"bidirectional": True, "batch_first": True}, ("lengths",)),
    "reset": ({"num_layers": 2}, ("reset",)),
    "cells": ({"return_cells": True, "proj_size": 2}, ()),
    "everything": ({**EVERYTHING, "return_cells": True}, ("hx", "lengths", "reset")),
}
each_call = pytest.mark.parametrize(("options", "named"), CALLS.values(), ids=CALLS)


def numba(**options: Any) -> Model:
    """A model whose eager calls take the kernels whatever their size, as those of a graph do."""
    return Model(**options, dtype=F64, backend="numba").eval()


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True], ids=["loose", "strict"])
@each_call
def test_runs_at_other_sizes(options, named, strict):
    model = numba(**options)
    program = exported(model, named, strict)
    assert layers(program) == model.rnn.num_layers
    run = program.module()
    for sizes in (EXPORTED, *OTHERS):
        call = arguments(model, named, *sizes)
        got = run(**call)
        same_bits(got, model(**call))
        if "reset" not in named:
            close(tree_leaves(got)[:3], by_torch(model, **call), ORDER_OF_SUMS)


def test_an_exported_model_checks_lengths():
    """Their values are looked at when it runs, as in eager mode."""
    model = numba()
    call = arguments(model, ("lengths",), *EXPORTED)
    call["lengths"][1] = EXPORTED[0] + 1
    with pytest.raises(ValueError, match="lengths should be from 0 to 6"):
        exported(model, ("lengths",)).module()(**call)


@each_call
def test_decompositions_keep_the_layer(options, named):
    model = numba(**options)
    program = exported(model, named).run_decompositions()
    assert layers(program) == model.rnn.num_layers
    call = arguments(model, named, *OTHERS[0])
    same_bits(program.module()(**call), model(**call))


@pytest.mark.slow
def test_survives_a_file(tmp_path):
    """A process that has not seen the model loads and runs it; it has to know the operator, so it imports lstmcore."""
    _, named = CALLS["everything"]
    model = numba(**EVERYTHING)
    torch.export.save(exported(model, named), tmp_path / "model.pt2")
    call = arguments(model, named, *OTHERS[0])
    torch.save(call, tmp_path / "call.pt")
    program = f"""
import torch, lstmcore
loaded = torch.export.load({str(tmp_path / "model.pt2")!r})
print(sum(node.target is torch.ops.lstmcore.layer.default for node in loaded.graph.nodes))
torch.save(loaded.module()(**torch.load({str(tmp_path / "call.pt")!r})), {str(tmp_path / "results.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]
    same_bits(torch.load(tmp_path / "results.pt"), model(**call))


@pytest.mark.parametrize("name", ["states", "everything"])
def test_an_exported_model_trains(name):
    """The gradients of the parameters, the input and the states are those of the model itself."""
    options, named = CALLS[name]
    model = numba(**options)
    run = exported(model, named).module()
    call = arguments(model, named, *OTHERS[0])
    leaves = [t.requires_grad_() for t in tree_leaves(call) if t.is_floating_point()]

    def gradients(of: nn.Module) -> list[Tensor]:
        loss = sum(t.square().sum() for t in tree_leaves(of(**call)))
        return list(torch.autograd.grad(loss, [*leaves, *of.parameters()]))

    assert [name for name, _ in run.named_parameters()] == [name for name, _ in model.named_parameters()]
    same_bits(gradients(run), gradients(model))


# AOTInductor


@pytest.mark.slow
@needs_cpp
def test_aot_inductor(tmp_path):
    """Compiled to a library once, with every kind of argument in it: lists, symbols and optional tensors."""
    import torch._inductor

    _, named = CALLS["everything"]
    model = Model(**EVERYTHING, return_cells=True, backend="numba").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Inductor, about its own matters
        path = torch._inductor.aoti_compile_and_package(
            exported(model, named),
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # sooner
        )
        run = torch._inductor.aoti_load_package(path)
    for sizes in (EXPORTED, *OTHERS):
        call = arguments(model, named, *sizes)
        same_bits(run(**call), model(**call))


# ONNX


@pytest.fixture
def onnx() -> Any:
    """The package, where all that an export needs is there."""
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"torch.onnx.export and its tests need {name}")
    return pytest.importorskip("onnx", reason="torch.onnx.export needs onnx")


def to_onnx(model: nn.Module, named: tuple[str, ...] = (), **options: Any) -> Any:
    """The ONNXProgram of a Model with open T and B, or of any model with its own ``kwargs``."""
    if isinstance(model, Model):
        call = arguments(model, named, *EXPORTED)
        options = {"kwargs": call, "dynamic_shapes": dynamic(model, named)} | options
    return torch.onnx.export(model, (), dynamo=True, verbose=False, **options)


def kinds(program: Any) -> list[str]:
    return [node.op_type for node in program.model_proto.graph.node]


def session(proto: Any) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def feed(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments by the names that the exporter gives them."""
    hx = call.get("hx", ())
    named = {name: value for name, value in call.items() if name != "hx"}
    return {name: t.numpy() for name, t in (named | {f"hx_{k}": t for k, t in enumerate(hx)}).items()}


def run_onnx(proto: Any, call: dict[str, Any]) -> list[Tensor]:
    return [torch.from_numpy(result) for result in session(proto).run(None, feed(call))]


def error_of(model: nn.Module, **options: Any) -> str:
    """What an export that cannot work says."""
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        to_onnx(model, **options)
    return str(caught.value)


ONNX_CALLS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "states": ({**DEEP, "backend": "numba"}, ("hx",)),
    "lengths": ({"batch_first": True, "bias": False, "backend": "torch"}, ("lengths",)),
    "all": ({**DEEP, "batch_first": True, "dropout": 0.5}, ("hx", "lengths")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "named"), ONNX_CALLS.values(), ids=ONNX_CALLS)
def test_onnx(options, named, onnx):
    """One LSTM a layer, whatever the backend, with its weights in the file, for any T and B; rows may have no steps."""
    model = Model(**options).eval()
    proto = to_onnx(model, named).model_proto
    onnx.checker.check_model(proto, full_check=True)
    nodes = [node for node in proto.graph.node if node.op_type == "LSTM"]
    assert len(nodes) == model.rnn.num_layers
    assert not {node.op_type for node in proto.graph.node} & {"Loop", "Scan", "If"}
    stored = {each.name for each in proto.graph.initializer}
    for node in nodes:
        assert {name for name in node.input[1:4] if name} <= stored
    for sizes in (EXPORTED, *OTHERS):
        call = arguments(model, named, *sizes)
        close(run_onnx(proto, call), by_torch(model, **call), ORDER_OF_SUMS_F32)


class Tagger(nn.Module):
    """One sequence, (T, I), and layers around the LSTM that have to be where its results are."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = lstmcore.LSTM(I, H, bidirectional=True), nn.Linear(2 * H, I)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0]) + x


@pytest.mark.slow
def test_onnx_of_one_sequence(onnx):
    model, x = Tagger().eval(), torch.randn(6, I)
    proto = to_onnx(model, kwargs={"x": x}, dynamic_shapes={"x": {0: Dim("T")}}).model_proto
    onnx.checker.check_model(proto, full_check=True)
    x = torch.randn(11, I)
    close(run_onnx(proto, {"x": x}), [model(x).double()], ORDER_OF_SUMS_F32)


@pytest.mark.slow
def test_onnx_of_a_model_on_another_device(onnx):
    """As one on a GPU: what stands for ONNX's operator while torch looks gives tensors of the CPU."""
    x = torch.randn(6, I, device="meta")
    program = to_onnx(Tagger().to("meta").eval(), kwargs={"x": x}, optimize=False)
    assert [node.op_type for node in program.model.graph].count("LSTM") == 1


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 23])
def test_onnx_opsets(opset, onnx):
    model = Model(**DEEP).eval()
    proto = to_onnx(model, opset_version=opset).model_proto
    assert [each.version for each in proto.opset_import if not each.domain] == [opset]
    onnx.checker.check_model(proto, full_check=True)
    call = arguments(model, (), *OTHERS[0])
    close(run_onnx(proto, call), by_torch(model, **call), ORDER_OF_SUMS_F32)


@pytest.mark.slow
def test_onnx_of_large_weights(onnx, tmp_path):
    """Too large for the exporter to compute: the runtime does, once, or the optimizer where one says so."""
    import onnxruntime
    from onnxscript import optimizer

    model = Model(hidden_size=64).eval()
    program = to_onnx(model)
    assert "Slice" in kinds(program)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    providers = ["CPUExecutionProvider"]
    onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options, providers=providers)
    assert "Slice" not in [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    optimizer.optimize(program.model, input_size_limit=2**40, output_size_limit=2**40)
    assert "Slice" not in kinds(program)
    call = arguments(model, (), *OTHERS[0])
    close(run_onnx(program.model_proto, call), by_torch(model, **call), ORDER_OF_SUMS_F32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, F64], ids=str)
def test_onnx_of_other_dtypes(dtype, onnx):
    """onnxruntime has no float64 of LSTM on the CPU, so ONNX's own evaluator runs it: it knows no lengths."""
    model = Model(**DEEP, dtype=dtype).eval()
    proto = to_onnx(model, ("hx",)).model_proto
    onnx.checker.check_model(proto, full_check=True)
    call = arguments(model, ("hx",), *OTHERS[0])
    if dtype == torch.float16:
        close(run_onnx(proto, call), by_torch(model, **call), 4 * torch.finfo(dtype).eps)
    else:
        from onnx.reference import ReferenceEvaluator

        got = [torch.from_numpy(result) for result in ReferenceEvaluator(proto).run(None, feed(call))]
        close(got, by_torch(model, **call), ORDER_OF_SUMS)


@pytest.mark.slow
def test_onnx_of_the_reference(onnx):
    """What ONNX's LSTM does not have, in plain operators: T is fixed, B is not."""
    model = Model(proj_size=2, return_cells=True, backend="reference").eval()
    steps, named = 3, ("hx", "reset")
    rows = {1: Dim("B")}
    shapes = {"x": rows, "hx": (rows, rows), "reset": rows}
    proto = to_onnx(model, kwargs=arguments(model, named, steps, 4), dynamic_shapes=shapes).model_proto
    onnx.checker.check_model(proto, full_check=True)
    assert not {node.op_type for node in proto.graph.node} & {"LSTM", "Loop", "Scan"}
    for rows in (4, 2, 1):
        call = arguments(model, named, steps, rows)
        close(run_onnx(proto, call), [t.double() for t in tree_leaves(model(**call))], ORDER_OF_SUMS_F32)


@pytest.mark.slow
def test_onnx_says_what_it_cannot(onnx):
    assert "has no projection" in (message := error_of(Model(proj_size=2).eval()))
    assert "backend='reference'" in message
    assert "number of steps has to be fixed" in error_of(Model(backend="reference").eval())


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = lstmcore.LSTM(I, H)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))[0].data


def test_packed_sequences_are_refused(onnx):
    """How many rows a step has is in their values, which an export does not know."""
    call = {"x": torch.randn(6, 4, I), "lengths": torch.tensor([3, 6, 1, 5])}
    with pytest.raises(RuntimeError, match="lengths="):
        torch.export.export(Packed().eval(), (), call)
    assert "lengths=" in error_of(Packed().eval(), kwargs=call)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_sizes": torch.ones(2)}, "PackedSequence .* lengths="),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, "no reset: backend='reference' exports"),
        ({"cells": True}, "no return_cells: backend='reference' exports"),
        ({"cells": True, "lengths": torch.ones(4)}, "but not with lengths="),
        ({"backend": "reference", "lengths": torch.ones(4)}, "use backend='auto'"),
        ({"input": torch.zeros(2, 4, I, dtype=torch.bfloat16)}, r"bfloat16: convert .* with \.float"),
    ],
    ids=["packed", "reset", "cells", "lengths", "reference", "bfloat16"],
)
def test_what_onnx_does_not_have(changes, says):
    """As the operator's schema hands it over."""
    from lstmcore import onnx, ops

    call: dict[str, Any] = {
        **dict.fromkeys(("h_0", "c_0", "reset", "batch_sizes", "lengths")),
        "input": torch.zeros(2, 4, I), "weights": list(lstmcore.LSTM(I, H).parameters()), "batch": 4, "directions": 1,
        "batch_first": False, "cells": False, "save": False, "backend": "auto",
    }  # fmt: skip
    with pytest.raises(ValueError, match=says):
        onnx.layer(*ops.Arguments(**call | changes))


@pytest.mark.slow
def test_onnx_of_an_exported_program(onnx):
    model = Model(**DEEP).eval()
    program = torch.onnx.export(exported(model, ("lengths",), strict=True), dynamo=True, verbose=False)
    assert kinds(program).count("LSTM") == 2
    call = arguments(model, ("lengths",), *OTHERS[0])
    close(run_onnx(program.model_proto, call), by_torch(model, **call), ORDER_OF_SUMS_F32)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_traced_by_torch_jit(name):
    """torch.jit's tracer, deprecated but in use, sees torch operations: those of torch.nn.LSTM where it can."""
    module = lstmcore.LSTM(I, 5, backend=name)
    x = torch.randn(6, 4, I)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (x,))
    other = torch.randn(6, 4, I)
    assert torch.allclose(traced(other)[0], module(other)[0], atol=1e-6)  # a few roundings of values below one
