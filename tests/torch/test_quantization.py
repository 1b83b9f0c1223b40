"""What torch.ao.quantization does with our modules: nothing, and says so wherever it would quantize torch's."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import lstmcore

T, B, I, H = 6, 4, 3, 8
SAYS = r"torch\.ao\.quantization knows only torch\.nn\.LSTM.*lstmcore\.unpatch\(model\)"
# torch's own: the API is to move to another package, and FX copies a scalar tensor
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor"),
]


class Tagger(nn.Module):
    def __init__(self, cls: type[nn.Module] = lstmcore.LSTM) -> None:
        super().__init__()
        self.lstm = cls(I, H)
        self.linear = nn.Linear(H, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.lstm(x)[0])


class OfTheUser(lstmcore.LSTM):
    pass


def said(function, *args) -> tuple[Any, list[str]]:
    """What it returns, and our warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    return result, [str(each.message) for each in caught if "lstmcore" in str(each.message)]


def prepared(model: nn.Module) -> nn.Module:
    model.qconfig = ao.get_default_qconfig("fbgemm")
    return ao.prepare(model.eval())


def prepared_for_training(model: nn.Module) -> nn.Module:
    model.qconfig = ao.get_default_qat_qconfig("fbgemm")
    return ao.prepare_qat(model.train())


def through_fx(model: nn.Module) -> nn.Module:
    mapping = ao.QConfigMapping().set_global(ao.default_dynamic_qconfig)
    return convert_fx(prepare_fx(model.eval(), mapping, (torch.randn(T, B, I),)))


QUANTIZED = {
    "dynamic": ao.quantize_dynamic,
    "dynamic, float16": lambda model: ao.quantize_dynamic(model, dtype=torch.float16),
    "dynamic, torch's class": lambda model: ao.quantize_dynamic(model, {nn.LSTM}),
    "dynamic, ours": lambda model: ao.quantize_dynamic(model, {lstmcore.LSTM, OfTheUser}),
    "dynamic, by name": lambda model: ao.quantize_dynamic(model, {"lstm": ao.default_dynamic_qconfig}),
    "dynamic, in place": lambda model: ao.quantize_dynamic(model, inplace=True),
    "static": prepared,
    "aware training": prepared_for_training,
    "fx": through_fx,
}


@pytest.mark.parametrize("cls", [lstmcore.LSTM, OfTheUser])
@pytest.mark.parametrize("how", QUANTIZED)
def test_it_says_so(how, cls):
    result, found = said(QUANTIZED[how], Tagger(cls))
    assert type(result.lstm) is cls
    assert len(set(found)) == 1  # Python shows it once, though some set the attribute more than once
    assert re.search(SAYS, found[0])
    assert f"this {cls.__name__} of lstmcore" in found[0]


def test_cells_and_a_model_that_is_one():
    cell, found = said(ao.quantize_dynamic, nn.Sequential(lstmcore.LSTMCell(I, H)))
    assert type(cell[0]) is lstmcore.LSTMCell
    assert len(found) == 1
    assert "torch.nn.LSTMCell, so this LSTMCell" in found[0]
    assert "module.__class__ = torch.nn.LSTMCell if" in found[0]
    assert len(said(ao.quantize_dynamic, lstmcore.LSTM(I, H))[1]) == 1


def exempted(model: nn.Module) -> nn.Module:
    model.lstm.qconfig = None  # the way to exempt a module
    return prepared(model)


NOT_ASKED_FOR = {
    "other classes": lambda model: ao.quantize_dynamic(model, {nn.Linear}),
    "other names": lambda model: ao.quantize_dynamic(model, {"linear": ao.default_dynamic_qconfig}),
    "embeddings": lambda model: ao.quantize_dynamic(model, dtype=torch.quint8),
    "exempted": exempted,
    "exempted from all": lambda model: ao.quantize_dynamic(exempted(model)),
    "copied": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
}


@pytest.mark.parametrize("how", NOT_ASKED_FOR)
def test_silent_where_torchs_would_stay_as_well(how):
    for cls in (lstmcore.LSTM, nn.LSTM):
        result, found = said(NOT_ASKED_FOR[how], Tagger(cls))
        assert type(result.lstm) is cls
        assert not found


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
def test_what_the_warning_advises(options, dtype):
    """Torch's class back, then torch's quantization: near to what ours computes."""
    model = nn.Sequential(lstmcore.LSTM(I, H, **options, backend="numba"))
    x = torch.randn(T, B, I)
    expected = model(x)[0]
    model[0].__class__ = nn.LSTM
    quantized, found = said(lambda: ao.quantize_dynamic(model, dtype=dtype))
    assert not found
    assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.LSTM
    assert torch.allclose(quantized(x)[0], expected, atol=0.02)
    model[0].__class__ = lstmcore.LSTM
    assert torch.equal(model(x)[0], expected)


def test_an_attribute_like_others():
    """It is there when it has been set, and copies and pickles have it."""
    for module in (lstmcore.LSTM(I, H), lstmcore.LSTMCell(I, H)):
        assert not hasattr(module, "qconfig")
        with pytest.raises(AttributeError, match="qconfig"):
            _ = module.qconfig
        with pytest.raises(AttributeError, match="qconfig"):
            del module.qconfig
        module.qconfig = None
        assert module.qconfig is None
        assert pickle.loads(pickle.dumps(copy.deepcopy(module))).qconfig is None
        del module.qconfig
        assert not hasattr(module, "qconfig")
        assert "qconfig" not in module.state_dict()


def test_scripts_and_graphs_of_a_module_that_was_prepared():
    model = Tagger()
    with pytest.warns(UserWarning, match=SAYS):
        model.lstm.qconfig = ao.default_dynamic_qconfig
    x = torch.randn(T, B, I)
    expected = model(x)
    assert torch.allclose(torch.jit.script(copy.deepcopy(model))(x), expected, atol=1e-6)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(x), expected, atol=1e-6)
