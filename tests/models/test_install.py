"""``lstmcore.install``: torch's names are ours, for code that builds its models itself."""

from __future__ import annotations

import io
import sys
import threading
import types
import warnings

import pytest
import torch
from torch import nn

import lstmcore
from lstmcore import stock

from ..support.modules import close
from ..support.processes import in_process

X = torch.randn(7, 3, 5)
pytestmark = pytest.mark.serial  # names are those of the whole process


@pytest.fixture(autouse=True)
def _as_before():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="these have torch's class")
        yield
    lstmcore.uninstall()
    assert (nn.LSTM, nn.LSTMCell) == stock.BOTH


@pytest.mark.parametrize("subclass", [False, True], ids=["", "subclass"])
def test_names_and_instances(subclass):
    with lstmcore.installed(subclass=subclass):
        for place in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
            assert issubclass(place.LSTM, lstmcore.LSTM)
            assert issubclass(place.LSTMCell, lstmcore.LSTMCell)
        from torch.nn import LSTM

        built, cell = LSTM(5, 17), nn.LSTMCell(5, 17)
        assert isinstance(built, nn.LSTM)
        assert isinstance(cell, nn.LSTMCell)
        assert type(built) is nn.LSTM
    for place in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
        assert (place.LSTM, place.LSTMCell) == stock.BOTH
    assert isinstance(built, lstmcore.LSTM)
    assert isinstance(cell, lstmcore.LSTMCell)
    assert isinstance(built, nn.LSTM) == isinstance(cell, nn.LSTMCell) == subclass


def test_same_seed_same_model():
    torch.manual_seed(0)
    theirs = nn.LSTM(5, 17, 2, bidirectional=True)
    torch.manual_seed(0)
    with lstmcore.installed():
        ours = nn.LSTM(5, 17, 2, bidirectional=True)
    close(ours(X)[0], theirs(X)[0])


def test_classes_derived_meanwhile():
    with lstmcore.installed():

        class Mine(nn.LSTM):
            def forward(self, input):
                return super().forward(input)[0] * 2

        mine = Mine(5, 17)
    plain = stock.LSTM(5, 17)
    plain.load_state_dict(mine.state_dict())
    close(mine(X), plain(X)[0] * 2)


def test_nested_and_failing():
    with lstmcore.installed():
        with pytest.raises(TypeError), lstmcore.installed(subclass=True):
            nn.LSTM(5)
        assert nn.LSTM is lstmcore.LSTM
        lstmcore.install(subclass=True)
    assert nn.LSTM is stock.LSTM


def test_left_in_another_order():
    """As two threads do."""
    first, second, third = (lstmcore.installed(subclass=subclass) for subclass in (False, True, False))
    for each in (first, second, third):
        each.__enter__()
    second.__exit__(None, None, None)
    assert nn.LSTM is lstmcore.LSTM
    first.__exit__(None, None, None)
    assert nn.LSTM is lstmcore.LSTM
    third.__exit__(None, None, None)
    assert nn.LSTM is stock.LSTM


def test_another_ones_replacement_is_put_back(monkeypatch):
    class Theirs(stock.LSTM):
        pass

    monkeypatch.setattr(torch.nn, "LSTM", Theirs)
    with lstmcore.installed():
        assert nn.LSTM is lstmcore.LSTM
    assert nn.LSTM is Theirs
    assert torch.nn.modules.LSTM is stock.LSTM
    monkeypatch.undo()


def test_ours_know_torchs_own():
    """What asks for torch's class does not mean its name's."""
    theirs, ours = nn.LSTM(5, 17), lstmcore.LSTM(5, 17)
    ours.load_state_dict(theirs.state_dict())
    with lstmcore.installed():
        assert lstmcore.patch(theirs, dry_run=True).moved == [""]
        close(torch.jit.script(nn.Sequential(ours))(X)[0], ours(X)[0])
        output = lstmcore.Stream(theirs, 3).chunk(X)
        close(torch.as_tensor(output), theirs(X)[0])
        with pytest.raises(TypeError, match="neither lengths nor reset"):
            next(iter(lstmcore.truncated(theirs, X, steps=3, lengths=[7, 5, 3])))


def test_a_pickled_model_is_loaded_as_ours():
    theirs, file = nn.Sequential(nn.LSTM(5, 17)), io.BytesIO()
    torch.save(theirs, file)
    file.seek(0)
    with lstmcore.installed():
        loaded = torch.load(file, weights_only=False)
    assert type(loaded[0]) is lstmcore.LSTM
    close(loaded(X)[0], theirs(X)[0])


def held(**names) -> types.ModuleType:
    module = types.ModuleType("some_library")
    vars(module).update(names)
    return module


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"LSTM": stock.LSTM}, "some_library.LSTM"),
        ({"Cell": stock.LSTMCell}, "some_library.Cell"),
        ({"KINDS": {"GRU": nn.GRU, "LSTM": stock.LSTM}}, "some_library.KINDS"),
        ({"KINDS": {stock.LSTM: 1}}, "some_library.KINDS"),
        ({"KINDS": (nn.GRU, stock.LSTMCell)}, "some_library.KINDS"),
        ({"KINDS": {"lstm": (stock.LSTM, 2)}}, "some_library.KINDS"),  # as flair's
    ],
)
@pytest.mark.parametrize("how", ["install", "installed"])
def test_who_escapes_is_named(how, names, told, monkeypatch):
    monkeypatch.setitem(sys.modules, "some_library", held(**names))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "install":
            lstmcore.install()
        else:
            with lstmcore.installed():
                pass
    (warning,) = [each for each in caught if "torch's class already" in str(each.message)]
    assert told in str(warning.message)
    assert "lstmcore.patch(model)" in str(warning.message)
    assert warning.filename == __file__


def test_a_derived_class_is_named():
    class Mine(stock.LSTM):
        pass

    with pytest.warns(UserWarning, match=r"Mine \(derived from it\)"):
        lstmcore.install()


@pytest.mark.slow
def test_nobody_is_named_where_nobody_is():
    in_process("""
        import warnings
        warnings.simplefilter("error")
        with lstmcore.installed():
            assert type(torch.nn.LSTM(3, 4)) is lstmcore.LSTM
        assert type(torch.nn.LSTM(3, 4)) is not lstmcore.LSTM
        lstmcore.install()
        lstmcore.install()
        assert type(torch.nn.LSTM(3, 4)) is lstmcore.LSTM
        from torch.nn import LSTM
        try:
            lstmcore.uninstall()
            torch.nn.LSTM, torch.nn.LSTMCell
            lstmcore.install()  # LSTM here is ours: it does not escape
        except UserWarning as warning:
            raise SystemExit(f"named: {warning}")
    """)


def test_other_threads_see_it():
    with lstmcore.installed():
        built = []
        thread = threading.Thread(target=lambda: built.append(nn.LSTM(5, 17)))
        thread.start()
        thread.join()
    assert type(built[0]) is lstmcore.LSTM
