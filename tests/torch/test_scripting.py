"""``torch.jit.script``, ``torch.fx``, ``torch.jit.trace``, and subclasses: where nn.LSTM works, ours does."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstmcore

from ..support.modules import close

I, H = 5, 7
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.torch.jit.:{kind}") for kind in ("DeprecationWarning", "FutureWarning")
]


class Padded(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


class Packed(Padded):
    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0])[0]


MODULES = {
    "plain": (lstmcore.LSTM, nn.LSTM, {}),
    "everything": (
        lstmcore.LSTM,
        nn.LSTM,
        {"num_layers": 2, "bidirectional": True, "proj_size": 3, "bias": False, "batch_first": True},
    ),
    "cell": (lstmcore.LSTMCell, nn.LSTMCell, {}),
    "rnn": (lstmcore.RNN, nn.RNN, {"num_layers": 2}),
    "relu": (lstmcore.RNN, nn.RNN, {"nonlinearity": "relu"}),
}


def fed(name: str) -> torch.Tensor:
    return torch.randn(4, I) if name == "cell" else torch.randn(9, 4, I)


@pytest.mark.parametrize("name", MODULES)
def test_script(name):
    """What is compiled is torch's module, on the same parameters; the model itself keeps ours."""
    ours, theirs, options = MODULES[name]
    module = ours(I, H, **options)
    net, x = Padded(module), fed(name)
    expected = net(x)
    scripted = torch.jit.script(net)
    assert scripted.rnn.original_name == theirs.__name__
    close(scripted(x), expected)
    close(net(x), expected)
    assert type(net.rnn) is ours
    assert repr(net.rnn) == repr(module)
    with torch.no_grad():
        next(module.parameters()).mul_(0.5)
    close(scripted(x), net(x))  # shared
    net.eval()
    assert not module.training
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    close(torch.jit.load(file)(x), net(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_copies_of_a_model_that_was_scripted(name):
    ours, _, options = MODULES[name]
    net, x = Padded(ours(I, H, **options)), fed(name)
    expected = net(x)
    for twice in range(2):
        torch.jit.script(net)
        assert isinstance(net.rnn, ours)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert type(twin.rnn) is ours
            close(twin(x), expected)
        torch.jit.script(net)
        torch.jit.script(net)
        close(net(x), expected)
        assert type(net.rnn) is ours, twice


def test_script_of_packed_sequences():
    net, x, lengths = Packed(lstmcore.LSTM(I, H, bidirectional=True)), torch.randn(9, 3, I), torch.tensor([4, 9, 1])
    close(torch.jit.script(net)(x, lengths), net(x, lengths))


def test_script_leaves_subclasses_and_what_torch_lacks_alone():
    """torch's code would not compute what they do: so they fail to compile, as they are."""

    class Twice(lstmcore.LSTM):
        def forward(self, x):
            output, states = lstmcore.LSTM.forward(self, x)
            return 2 * output, states

    for module in (Twice(I, H), lstmcore.RNN(I, H, nonlinearity="sigmoid")):
        net = Padded(module)
        with pytest.raises((RuntimeError, ValueError)):
            torch.jit.script(net)
        assert net.rnn is module


@pytest.mark.parametrize("name", MODULES)
def test_fx_sees_a_leaf(name):
    ours, theirs, options = MODULES[name]
    x, graphs = fed(name), []
    for module in (ours(I, H, **options), theirs(I, H, **options)):
        net = Padded(module)
        traced = torch.fx.symbolic_trace(net)
        close(traced(x), net(x))
        graphs.append(str(traced.graph))
    assert graphs[0] == graphs[1]


def test_fx_with_all_arguments():
    class Net(Padded):
        def forward(self, x, h, c, lengths, reset):
            output, _, cells = self.rnn(x, (h, c), lengths=lengths, reset=reset, return_cells=True)
            return output, cells

    net = Net(lstmcore.LSTM(I, H))
    given = (torch.randn(9, 4, I), torch.randn(1, 4, H), torch.randn(1, 4, H), torch.tensor([9, 2, 0, 4]))
    given += (torch.rand(9, 4) < 0.3,)
    traced = torch.fx.symbolic_trace(net)
    assert sum(node.op == "call_module" for node in traced.graph.nodes) == 1
    for got, expected in zip(traced(*given), net(*given), strict=True):
        assert torch.equal(got, expected)


def test_fx_of_the_module_itself():
    with pytest.raises(torch.fx.proxy.TraceError, match="leaf"):
        torch.fx.symbolic_trace(lstmcore.LSTM(I, H))


OTHERS = ([9, 5, 4], [1, 9, 2], [12, 7, 1], [12, 7, 1, 3], [2, 7], [1])


@pytest.mark.parametrize("name", ["auto", "torch"])
@pytest.mark.parametrize("hx", [False, True])
def test_trace_of_packed_sequences(name, hx):
    """Any batch, any lengths; and no more warnings than of torch's own."""

    class Net(Packed):
        def forward(self, x, lengths, *states):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            return pad_packed_sequence(self.rnn(packed, states or None)[0])[0]

    def given(lengths: list[int]) -> tuple[torch.Tensor, ...]:
        states = torch.randn(2, 2, len(lengths), H) if hx else ()
        return torch.randn(max(lengths), len(lengths), I), torch.tensor(lengths), *states

    net = Net(lstmcore.LSTM(I, H, bidirectional=True, backend=name))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module="torch.")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"lstmcore\.(functional|checks)")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, message=".torch.jit.trace. is")
        warnings.simplefilter("error", append=True)
        traced = torch.jit.trace(net, given([9, 5, 4]), check_trace=False)
    for lengths in OTHERS:
        arguments = given(lengths)
        close(traced(*arguments), net(*arguments))


@pytest.mark.parametrize("call", [{"lengths": [9, 2, 3]}, {"lengths": torch.tensor([9, 2, 3])}], ids=["list", "tensor"])
def test_trace_that_would_keep_lengths(call):
    """No trace that is right for one batch only: an error that says what to do."""

    class Net(Padded):
        def forward(self, x):
            return self.rnn(x, **call)[0]

    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.*torch\.export"):
        torch.jit.trace(Net(lstmcore.LSTM(I, H)), torch.randn(9, 3, I))
    packed = Packed(lstmcore.LSTM(I, H, backend="reference"))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.*backend='auto' or 'torch'"):
        torch.jit.trace(packed, (torch.randn(9, 3, I), torch.tensor([9, 2, 3])))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 3}], ids=str)
def test_helpers_that_subclasses_call(options):
    """Those of nn.LSTM, with what they raise."""
    results = []
    for base in (nn.LSTM, lstmcore.LSTM):

        class Mine(base):
            def forward(self, x, hx, base=base):
                self.check_forward_args(x, hx, None)
                hx = self.permute_hidden(hx, torch.tensor([1, 0]))
                assert self.permute_hidden(hx, None) is hx
                return base.forward(self, x, hx)

        torch.manual_seed(0)
        module = Mine(I, H, **options)
        x = torch.randn(4, 2, I)
        sizes = module.get_expected_hidden_size(x, None), module.get_expected_cell_size(x, None)
        states = tuple(map(torch.randn, sizes))
        output, (h_n, c_n) = module(x, states)
        texts = []
        for wrong in ((states[0][:1, :1], states[1]), (states[0], states[1][..., :1])):
            with pytest.raises(RuntimeError) as caught:
                module(x, wrong)
            texts.append(str(caught.value))
        packed = module.get_expected_cell_size(torch.randn(5, I), torch.tensor([3, 2]))
        results.append((sizes, packed, texts, output, h_n, c_n))
    assert results[0][:3] == results[1][:3]
    for got, expected in zip(results[1][3:], results[0][3:], strict=True):
        close(got, expected)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell", "RNN"])
def test_methods_copied_into_another_class(name):
    """As torchrl does with those of nn.LSTM: there a zero-argument super() has no class to start from."""
    original = getattr(lstmcore, name)
    left_out = ("__dict__", "__weakref__", "__classcell__")
    copied = type("Copied", original.__bases__, {k: v for k, v in vars(original).items() if k not in left_out})
    torch.manual_seed(0)
    module = copied(I, H)
    torch.manual_seed(0)
    expected = original(I, H)
    x = fed("cell" if name == "LSTMCell" else "")
    close(module(x)[0], expected(x)[0])
    module.reset_parameters()
    assert repr(module).replace("Copied", name) == repr(expected)
