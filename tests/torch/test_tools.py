"""Tools that look modules up by their type: what each does with ours, row by row of the table in docs/pytorch.md.

Those of torch are always tried; thop, ptflops, torchinfo, torchsummary and torchao where they are installed.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.ao.pruning._experimental.pruner import LSTMSaliencyPruner
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils import mkldnn

import lstmcore

T, B, I, H = 6, 4, 3, 8
LINEAR = T * B * 2 * H * 5  # multiply-adds of the linear layer
LSTM = T * B * sum(2 * 4 * H * (inputs + H) for inputs in (I, 2 * H))  # of two layers in both directions


class Tagger(nn.Module):
    def __init__(self, cls: type[nn.Module], **options) -> None:
        super().__init__()
        options = options or {"num_layers": 2, "bidirectional": True}
        self.lstm = cls(I, H, batch_first=True, **options)
        self.linear = nn.Linear(H * (1 + self.lstm.bidirectional), 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.lstm(x)[0])


def built() -> Tagger:
    return Tagger(lstmcore.LSTM)


def moved() -> Tagger:
    model = Tagger(nn.LSTM)
    lstmcore.patch(model)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, T, I)


# torch's own


def test_pruning_whole_units(x):
    """An LSTM among its patterns is torch's: ours is an error when it prunes, and unpatch is the way."""
    for undone in (False, True):
        model = Tagger(nn.LSTM, num_layers=1)
        lstmcore.patch(model)
        if undone:
            lstmcore.unpatch(model)
        pruner = LSTMSaliencyPruner({"sparsity_level": 0.5})
        pruner.prepare(model, [{"tensor_fqn": "lstm.weight_ih_l0"}, {"tensor_fqn": "lstm.weight_hh_l0"}])
        pruner.enable_mask_update = True
        pruner.step()
        if undone:
            assert pruner.prune()(x).shape == (B, T, 5)
            assert model.lstm.hidden_size == H // 2
        else:
            with pytest.raises(Exception, match="still contains FakeStructuredSparsity"):
                pruner.prune()


def test_pruning_weights(x):
    """By default Linear alone, with torch's LSTM as with ours; named weights are pruned in both."""
    for cls in (lstmcore.LSTM, nn.LSTM):
        sparsifier = WeightNormSparsifier()
        sparsifier.prepare(Tagger(cls), None)
        assert [group["tensor_fqn"] for group in sparsifier.groups] == ["linear.weight"]
        model, sparsifier = Tagger(cls), WeightNormSparsifier(sparsity_level=0.9)
        sparsifier.prepare(model, [{"tensor_fqn": "lstm.weight_hh_l0"}])
        sparsifier.step()
        sparsifier.squash_mask()
        assert (model.lstm.weight_hh_l0 == 0).float().mean() > 0.5
        assert model(x).isfinite().all()


def test_expanded_weights(x):
    """torch's per-sample gradients without torch.func have no LSTM: an error, with either."""
    for cls in (lstmcore.LSTM, nn.LSTM):
        with pytest.raises(RuntimeError, match="Expanded Weights encountered but cannot handle function"):
            call_for_per_sample_grads(Tagger(cls), batch_size=B, loss_reduction="sum")(x)


def test_to_mkldnn(x):
    """It converts Linear and convolutions, and leaves any LSTM alone."""
    model = built().eval()
    converted = mkldnn.to_mkldnn(model)
    assert type(converted.lstm) is lstmcore.LSTM
    assert torch.allclose(converted(x), model(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the exporter: that it is the old one, and of what it traces
def test_the_old_onnx_exporter(x):
    """It traces, and ours leaves torch's operator in a trace."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    for model in (built(), moved(), Tagger(nn.LSTM)):
        file = io.BytesIO()
        torch.onnx.export(model.eval(), (x,), file, dynamo=False)
        operators = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
        assert operators.count("LSTM") == 2


def test_the_profilers_flops(x):
    """It counts products alone, of torch's dense LSTM as of ours none: FlopCounterMode counts both."""
    for model in (built(), moved(), Tagger(nn.LSTM)):
        with torch.profiler.profile(with_flops=True) as profile:
            model(x)
        counted = {event.key: event.flops for event in profile.key_averages() if event.flops}
        assert "aten::mm" in counted or "aten::addmm" in counted  # the linear layer
        assert not any("lstm" in name or "rnn" in name for name in counted)


# others


@pytest.mark.parametrize("make", [built, moved])
def test_thop(make, x):
    """By type: nothing, unless it is told, or the model is torch's again."""
    thop = pytest.importorskip("thop", reason="thop is not installed")
    expected = thop.profile(Tagger(nn.LSTM), (x,), verbose=False)
    assert thop.profile(make(), (x,), verbose=False)[0] == LINEAR
    told = {lstmcore.LSTM: thop.rnn_hooks.count_lstm}
    assert thop.profile(make(), (x,), custom_ops=told, verbose=False) == expected
    model = moved()
    lstmcore.unpatch(model)
    assert thop.profile(model, (x,), verbose=False) == expected


def test_ptflops(x):
    """By type as well, or, with another backend, by operator."""
    ptflops = pytest.importorskip("ptflops", reason="ptflops is not installed")

    def counted(model: nn.Module, **options) -> int:
        quiet = {"as_strings": False, "print_per_layer_stat": False, "verbose": False}
        fed = {"input_constructor": lambda shape: {"x": x}}
        return ptflops.get_model_complexity_info(model, (T, I), **quiet, **fed, **options)[0]

    model = moved()
    assert counted(model, backend="pytorch") < 2 * LINEAR
    lstmcore.unpatch(model)
    assert counted(model, backend="pytorch") == counted(Tagger(nn.LSTM), backend="pytorch") > LINEAR + LSTM

    by_operator = lstmcore.flops.formulas().items()
    told = {operator: lambda args, _, count=count: count(*args) // 2 for operator, count in by_operator}
    for model in (built(), moved(), Tagger(nn.LSTM)):
        assert counted(model, backend="aten") == LINEAR
        assert counted(model, backend="aten", custom_modules_hooks=told) == LINEAR + LSTM


def test_torchinfo(x):
    """By the parameters, whatever the class."""
    torchinfo = pytest.importorskip("torchinfo", reason="torchinfo is not installed")
    tables = [torchinfo.summary(make, input_data=x, verbose=0) for make in (built(), moved(), Tagger(nn.LSTM))]
    assert len({(table.total_mult_adds, table.total_params) for table in tables}) == 1


def test_torchsummary():
    """It does not know modules that return tuples, torch's LSTM included."""
    torchsummary = pytest.importorskip("torchsummary", reason="torchsummary is not installed")
    for model in (built(), Tagger(nn.LSTM)):
        with pytest.raises(AttributeError, match="'tuple' object has no attribute 'size'"):
            torchsummary.summary(model, (T, I), device="cpu")


def test_torchao(x):
    """It quantizes Linear, and leaves any LSTM alone."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    for model in (built(), moved(), Tagger(nn.LSTM)):
        before = type(model.lstm)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        assert type(model.lstm) is before
        assert type(model.lstm.weight_hh_l0.data) is Tensor
        assert type(model.linear.weight.data) is not Tensor
        assert model(x).isfinite().all()
