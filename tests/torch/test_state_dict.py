"""Parameters: names, order, initialisation stream, and what saves and copies them."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lstmcore

from ..support.cases import CASES, Case
from ..support.tolerances import assert_library, assert_same

OPTIONS = [
    Case("plain"),
    Case("no_bias", bias=False),
    Case("layers", num_layers=3),
    Case("proj", proj_size=3),
    Case("all", num_layers=2, bidirectional=True, proj_size=5, batch_first=True),
]


def pair(case: Case, **kwargs) -> tuple[lstmcore.LSTM, nn.LSTM]:
    """Ours and torch's, made from the same seed."""
    made = []
    for cls in (lstmcore.LSTM, nn.LSTM):
        torch.manual_seed(5)
        made.append(cls(**case.arguments(), **kwargs))
    return made[0], made[1]


def assert_same_parameters(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = list(a.named_parameters()), list(b.named_parameters())
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, p), (_, q) in zip(ours, theirs, strict=True):
        assert p.dtype == q.dtype, name
        assert torch.equal(p, q), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_names_order_and_initialisation_stream(case, dtype):
    ours, theirs = pair(case, dtype=dtype)
    assert_same_parameters(ours, theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.all_weights[0][0].shape == theirs.all_weights[0][0].shape
    after = [torch.manual_seed(5) and type(m)(**case.arguments()) and torch.rand(3) for m in (ours, theirs)]
    assert torch.equal(*after), "construction drew a different number of random values"


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_state_dict_both_ways(case):
    ours, theirs = pair(case)
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for p in target.parameters():
                p.fill_(7.0)
        assert target.load_state_dict(source.state_dict(), strict=True) == ([], [])
        assert_same_parameters(target, source)


@pytest.mark.parametrize("case", [c for c in CASES if c.num_layers > 1] + OPTIONS, ids=str)
def test_repr(case):
    ours, theirs = pair(case)
    assert repr(ours) == repr(theirs)


def test_repr_shows_dropout_and_a_named_backend_stays_out_of_the_way():
    assert repr(lstmcore.LSTM(3, 4, 2, dropout=0.25)) == repr(nn.LSTM(3, 4, 2, dropout=0.25))
    assert repr(lstmcore.LSTM(3, 4, backend="reference")).startswith("LSTM(3, 4")


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "pickle", "save"],
)
@pytest.mark.parametrize("used_before", [False, True])
def test_copies(copied, used_before, backend):
    module = lstmcore.LSTM(3, 17, 2, bidirectional=True, proj_size=4, backend=backend).eval()
    x = torch.randn(5, 2, 3)
    if used_before:
        module(x)[0].sum().backward()
    twin = copied(module)
    assert_same_parameters(twin, module)
    assert repr(twin) == repr(module)
    assert not twin.training
    assert_same(twin(x)[0], module(x)[0], backend)
    with torch.no_grad():
        twin.weight_hh_l0.add_(1.0)
    assert not torch.equal(twin(x)[0], module(x)[0]), "the copy shares its weights with the original"


def test_state_dict_file_of_torch():
    """A checkpoint of nn.LSTM loads, with torch's safe loader, and gives its outputs."""
    theirs, file = nn.LSTM(3, 17, 2), io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours = lstmcore.LSTM(3, 17, 2, backend="torch")
    ours.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(4, 2, 3)
    assert_library(ours(x)[0], theirs(x)[0])


def test_cell_parameters():
    torch.manual_seed(5)
    ours = lstmcore.LSTMCell(3, 7)
    torch.manual_seed(5)
    theirs = nn.LSTMCell(3, 7)
    assert_same_parameters(ours, theirs)
    assert repr(ours) == repr(theirs)
    assert_same_parameters(copy.deepcopy(ours), theirs)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_changed_weights_are_used(backend):
    """In place, replaced, moved to another dtype, and by functional_call: no stale copy may be used."""
    module = lstmcore.LSTM(3, 17, backend=backend)
    x = torch.randn(4, 2, 3)
    peer = nn.LSTM(3, 17)

    def check(dtype=torch.float32, **tolerance):
        peer.to(dtype).load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x.to(dtype))[0], peer(x.to(dtype))[0], **tolerance)

    check()
    with torch.no_grad():
        module.weight_hh_l0.mul_(-2)
    check()
    module.weight_ih_l0 = nn.Parameter(torch.randn(68, 3))
    check()
    module.double()
    check(torch.float64)
    weights = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    got = torch.func.functional_call(module, weights, (x.double(),))[0]
    module.load_state_dict(weights)
    assert_library(got, module(x.double())[0])
    assert module.flatten_parameters() is None


def test_is_not_an_nn_lstm_but_an_rnn_base():
    """torch's compiler refuses instances of nn.LSTM."""
    module = lstmcore.LSTM(3, 4)
    assert isinstance(module, nn.RNNBase)
    assert not isinstance(module, nn.LSTM)
