"""What counters of floating-point operations find: the products of matrices, as many as torch's own decomposition has.

T time, B batch, N tokens, I input, H hidden, P projection (H without one), D directions.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import lstmcore

from ..support.modules import pair
from ..support.processes import run_program

T, B, I, H = 6, 4, 3, 8
LENGTHS = torch.tensor([6, 4, 3, 1])
OPTIONS = {
    "one": {},
    "no biases": {"bias": False},
    "projection": {"proj_size": 5},
    "deep": {"num_layers": 3},
    "both directions": {"num_layers": 2, "bidirectional": True, "proj_size": 5},
    "batch first": {"batch_first": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def products(module: nn.Module, tokens: int) -> int:
    """By hand: a multiplication and an addition for each entry of each weight matrix and token."""
    I, H, P, D = module.input_size, module.hidden_size, module.proj_size, 1 + module.bidirectional
    layers = [I] + [D * (P or H)] * (module.num_layers - 1)
    return sum(2 * tokens * D * (4 * H * (inputs + (P or H)) + P * H) for inputs in layers)


def counted(run, *args, **kwargs) -> dict[str, int]:
    """Operations by operator; ``run`` is called with the counter on."""
    with FlopCounterMode(display=False) as counter:
        run(*args, **kwargs)
    return {str(operator): flops for operator, flops in counter.get_flop_counts().get("Global", {}).items()}


def train(module: nn.Module, input, *hx: Tensor, **call) -> None:
    output = module(input, hx or None, **call)[0]
    (output if isinstance(output, Tensor) else output.data).sum().backward()


@each_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_by_hand(dtype, options):
    module = lstmcore.LSTM(I, H, **options, dtype=dtype, backend="numba")
    with torch.no_grad():
        assert counted(module, torch.randn(T, B, I, dtype=dtype)) == {"lstmcore.layer": products(module, T * B)}


@each_option
@pytest.mark.parametrize("wanted", ["weights", "input", "states", "everything", "input alone"])
def test_training_as_torchs_decomposition(options, wanted):
    """torch.nn.LSTM in float64 consists of products, which torch counts one by one."""
    ours, theirs = pair(I, H, **options, backend="numba", dtype=torch.float64)
    L, D = ours.num_layers, 1 + ours.bidirectional
    shapes = (T, B, I), (L * D, B, ours.proj_size or H), (L * D, B, H)
    x, *hx = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    if ours.batch_first:
        x = x.transpose(0, 1)
    x.requires_grad_(wanted not in ("weights", "states"))
    for each in hx:
        each.requires_grad_(wanted in ("states", "everything"))
    for module in (ours, theirs):
        module.requires_grad_(wanted != "input alone")
    got, expected = (counted(train, module, x, *hx) for module in (ours, theirs))
    assert set(got) == {"lstmcore.layer", "lstmcore.layer_backward"}
    assert set(expected) <= {"aten.mm", "aten.addmm"}
    assert sum(got.values()) == sum(expected.values())
    if wanted == "everything":
        assert sum(got.values()) == 3 * products(ours, T * B)


@each_option
def test_padding_does_not_count(options):
    """Packed as in torch's decomposition, and padded rows with lengths alike."""
    ours, theirs = pair(I, H, **options, backend="numba", dtype=torch.float64)
    L, D = ours.num_layers, 1 + ours.bidirectional
    hx = [torch.randn(L * D, B, size, dtype=torch.float64, requires_grad=True) for size in (ours.proj_size or H, H)]
    x = torch.randn(T, B, I, dtype=torch.float64)
    data, sizes, *_ = pack_padded_sequence(x, LENGTHS)
    packed = PackedSequence(data.requires_grad_(), sizes)
    got, expected = (counted(train, module, packed, *hx) for module in (ours, theirs))
    assert sum(got.values()) == sum(expected.values()) == 3 * products(ours, int(LENGTHS.sum()))
    padded = (x.transpose(0, 1) if ours.batch_first else x).requires_grad_()
    for lengths in (LENGTHS, LENGTHS.tolist()):
        assert counted(train, ours, padded, *hx, lengths=lengths) == got


def test_rows_without_a_step():
    """They have no first step whose gradient could be left out."""
    module, lengths = lstmcore.LSTM(I, H, backend="numba"), torch.tensor([5, 0, 2, 0])
    got = counted(train, module, torch.randn(T, B, I), lengths=lengths)
    from_step_to_step = 2 * 4 * H * H * (7 - 2)
    assert got == {
        "lstmcore.layer": products(module, 7),
        "lstmcore.layer_backward": products(module, 7) + from_step_to_step,
    }


def test_lengths_that_cannot_be_read():
    """Where tensors have no values, padding counts: at most as many."""
    with torch._subclasses.FakeTensorMode():
        module = lstmcore.LSTM(I, H)
        got = counted(module, torch.randn(T, B, I), lengths=torch.ones(B, dtype=torch.int64))
    assert got == {"lstmcore.layer": products(module, T * B)}


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("cls", [lstmcore.LSTM, nn.LSTM], ids=["ours", "torch's"])
def test_what_torch_runs(cls, options):
    """A call of a few steps goes to ATen, in float32 to oneDNN, which torch counts as nothing by itself."""
    module = cls(I, H, **options)
    if cls is lstmcore.LSTM:
        assert "torch" in str(lstmcore.explain(module, torch.randn(1, B, I)))
    got = counted(train, module, torch.randn(1, B, I))
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN: its LSTM consists of products")
    assert got == {
        "aten.mkldnn_rnn_layer": products(module, B),
        "aten.mkldnn_rnn_layer_backward": 2 * products(module, B),
    }


@pytest.mark.parametrize("backend", ["auto", "torch", "numba", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [1, 40])
def test_no_backend_counts_as_nothing(steps, dtype, backend):
    module = lstmcore.LSTM(I, H, 2, bidirectional=True, dtype=dtype, backend=backend)
    with torch.no_grad():
        got = counted(module, torch.randn(steps, B, I, dtype=dtype))
    assert sum(got.values()) == products(module, steps * B)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_cells(backend):
    cell = lstmcore.LSTMCell(I, H, backend=backend)
    assert sum(counted(cell, torch.randn(B, I)).values()) == 2 * B * 4 * H * (I + H)


def test_recomputing_counts_forward_again():
    """And so it does where forward saved nothing: in a graph that was exported, or transformed."""
    x = torch.randn(T, B, I)
    plain, again = (lstmcore.LSTM(I, H, backend="numba", recompute=recompute) for recompute in (None, 2))
    once, twice = counted(train, plain, x), counted(train, again, x)
    assert once["lstmcore.layer"] == twice["lstmcore.layer"] == products(plain, T * B)
    assert twice["lstmcore.layer_backward"] == once["lstmcore.layer_backward"] + products(plain, T * B)

    def per_sample() -> None:
        def loss(parameters, row):
            return torch.func.functional_call(plain, parameters, (row,))[0].sum()

        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(dict(plain.named_parameters()), x)

    assert counted(per_sample)["lstmcore.layer_backward"] == twice["lstmcore.layer_backward"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2, "proj_size": 5}, {"recompute": 2}])
def test_a_counter_that_came_after_forward(options, dtype):
    """It sees backward alone, and changes no bit of it."""
    module = lstmcore.LSTM(I, H, **options, dtype=dtype, backend="numba")
    x = torch.randn(T, B, I, dtype=dtype)
    output = module(x)[0]
    expected = torch.autograd.grad(output.sum(), list(module.parameters()), retain_graph=True)
    got = counted(output.sum().backward)
    assert got == {"lstmcore.layer_backward": counted(train, module, x)["lstmcore.layer_backward"]}
    module.zero_grad()
    counted(module(x)[0].sum().backward)
    for parameter, grad in zip(module.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_exported_graph():
    """(Under a counter torch.compile runs a model as it is.)"""
    module, x = lstmcore.LSTM(I, H, 2), torch.randn(T, B, I)
    exported = torch.export.export(module, (x,)).module()
    assert counted(exported, x) == {"lstmcore.layer": products(module, T * B)}


def test_cudnn():
    """Its operator, without a GPU: torch computes the shapes, and the counter what it would take."""
    module = nn.LSTM(I, H, 2, bidirectional=True, proj_size=5, device="meta")
    x = torch.empty(T, B, I, device="meta")
    hx = torch.empty(4, B, 5, device="meta"), torch.empty(4, B, H, device="meta")
    weights = [parameter.detach() for parameter in module.parameters()]
    forward, backward = torch.ops.aten._cudnn_rnn, torch.ops.aten._cudnn_rnn_backward
    lstm, dropout, training = 2, 0.0, True
    got = counted(forward, x, weights, 5, None, *hx, lstm, H, 5, 2, False, dropout, training, True, [], None)
    assert got == {"aten._cudnn_rnn": products(module, T * B)}

    names = [argument.name for argument in backward.default._schema.arguments]
    given = dict.fromkeys(names) | {"input": x, "weight": weights}
    formula = lstmcore.flops.formulas()[backward]
    for weights_too in (False, True):
        given["output_mask"] = [True, True, True, weights_too]
        assert formula(*given.values(), out_val=None) == (1 + weights_too) * products(module, T * B)


IN_ANY_ORDER = {
    "lstmcore first": "import lstmcore; from torch.utils.flop_counter import FlopCounterMode",
    "the counter first": "from torch.utils.flop_counter import FlopCounterMode; import lstmcore",
    "twice, as notebooks do": """
import sys, lstmcore
for name in [name for name in sys.modules if name.split(".")[0] == "lstmcore"]:
    del sys.modules[name]
import lstmcore
from torch.utils.flop_counter import FlopCounterMode
""",
    "twice, after the counter": """
import sys, lstmcore
from torch.utils.flop_counter import FlopCounterMode
for name in [name for name in sys.modules if name.split(".")[0] == "lstmcore"]:
    del sys.modules[name]
import lstmcore
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("imports", IN_ANY_ORDER)
def test_imported_in_any_order(imports):
    printed = run_program(f"""
import torch
{IN_ANY_ORDER[imports]}
module = lstmcore.LSTM(3, 8, backend="numba")
with FlopCounterMode(display=False) as counter, torch.no_grad():
    module(torch.randn(6, 4, 3))
print(counter.get_total_flops())
""")
    assert printed.split() == [str(2 * 24 * 32 * 11), "done"]


def test_the_formulas_of_others_stay(monkeypatch):
    """A newer torch, or someone before us, may have counted oneDNN's operator."""
    from torch.utils import flop_counter

    theirs, operator = lambda *args, **kwargs: 1, torch.ops.aten.mkldnn_rnn_layer
    own = lstmcore.flops.formulas()
    registry = {key: value for key, value in flop_counter.flop_registry.items() if key not in own}
    monkeypatch.setattr(flop_counter, "flop_registry", registry | {operator: theirs})
    lstmcore.flops.register()
    assert flop_counter.flop_registry[operator] is theirs
    assert set(own) <= set(flop_counter.flop_registry)


# fvcore counts multiply-adds of what torch.jit traces


class Sum(nn.Module):
    def __init__(self, inner: nn.Module, packed: bool = False) -> None:
        super().__init__()
        self.inner, self.packed = inner, packed

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.inner(pack_padded_sequence(x, LENGTHS) if self.packed else x)
        return (output.data if self.packed else output).sum()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cls", [lstmcore.LSTM, nn.LSTM], ids=["ours", "torch's"])
def test_fvcore(cls, packed):
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    module = Sum(cls(I, H, 2, bidirectional=True, proj_size=5), packed).eval()
    analysis = fvcore.FlopCountAnalysis(module, torch.randn(T, B, I))
    analysis.unsupported_ops_warnings(False)
    assert analysis.total() == 0
    assert analysis.unsupported_ops()["aten::lstm"] == 1
    analysis.set_op_handle(**lstmcore.flops.FVCORE)
    tokens = int(LENGTHS.sum()) if packed else T * B
    assert analysis.by_operator()["lstm"] == products(module.inner, tokens) // 2
    assert not analysis.unsupported_ops()["aten::lstm"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_the_handle_without_fvcore(packed):
    """On the graph that it would see."""
    module = lstmcore.LSTM(I, H, 2, bidirectional=True, proj_size=5).eval()
    graph, _ = torch.jit._get_trace_graph(Sum(module, packed), (torch.randn(T, B, I),))
    handles = lstmcore.flops.FVCORE
    nodes = [node for node in graph.nodes() if node.kind() in handles]
    found = [handles[node.kind()](list(node.inputs()), list(node.outputs())) for node in nodes]
    assert found == [products(module, int(LENGTHS.sum()) if packed else T * B) // 2]
