"""``lstmcore.patch`` and ``unpatch``: what moves, that it stays what it was, what is left and why."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import re
import types
import warnings
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import lstmcore
from lstmcore.models import classes

from ..support.modules import close
from . import models
from .models import MOVES, H, I, Model

X = torch.randn(7, 3, I)
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")


def lstms(model: nn.Module) -> list[nn.Module]:
    return [each for each in model.modules() if isinstance(each, (nn.RNNBase, nn.RNNCellBase))]


def state(model: nn.Module) -> list[tuple]:
    """All that a module is but its results: class, attributes, and whose they are."""
    return [
        (type(each), [(name, id(value)) for name, value in vars(each).items()], list(vars(type(each))))
        for each in model.modules()
    ]


@pytest.mark.parametrize("subclass", [False, True], ids=["", "subclass"])
@pytest.mark.parametrize("kind", MOVES, ids=str)
def test_outputs_and_gradients_stay(kind, subclass):
    torch.manual_seed(0)
    model = kind.make().eval()
    expected, before = results_of(model), {name: id(value) for name, value in model.named_parameters()}
    report = lstmcore.patch(model, backend="numba", subclass=subclass)
    assert len(report.moved) == len(lstms(model)) == 1
    assert not report.left
    for each in lstms(model):
        assert isinstance(each, lstmcore.LSTM)
        assert isinstance(each, nn.LSTM) == (subclass or kind.derived)
        assert each.backend == "numba"
    assert {name: id(value) for name, value in model.named_parameters()} == before
    for got, wanted in zip(results_of(model), expected, strict=True):
        close(got, wanted)


def results_of(model: nn.Module) -> list[torch.Tensor]:
    if isinstance(model, nn.LSTM | lstmcore.LSTM) and model.batch_first:
        return models.results(model, X.transpose(0, 1))
    return models.results(model, X)


@pytest.mark.parametrize("kind", MOVES, ids=str)
def test_unpatch_restores(kind):
    model = kind.make().eval()
    results_of(model)  # hooks set attributes at a call
    before = state(model)
    lstmcore.patch(model, backend="numba", recompute=4, subclass=True)
    report = lstmcore.unpatch(model)
    assert len(report.moved) == 1
    assert state(model) == before


@pytest.mark.parametrize("kind", [kind for kind in MOVES if "aram" in kind.name or kind.name == "weight_norm"], ids=str)
def test_parametrizations_go_after_the_move(kind):
    """torch takes the base of a parametrized module's class back: ours, and after unpatch its own."""
    module = kind.make().eval()
    theirs = type(module).__bases__[0]
    lstmcore.patch(module)
    expected = results_of(module)[0]
    for name in [*module.parametrizations]:
        parametrize.remove_parametrizations(module, name)
    assert isinstance(module, lstmcore.LSTM)
    assert not type(module).__name__.startswith("Parametrized")
    close(results_of(module)[0], expected)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")  # and come after it
    lstmcore.unpatch(module)
    assert type(module).__bases__[0] is theirs
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is theirs
    close(results_of(module)[0], expected)


def test_everything_that_refers_to_it_still_does():
    model = Model()
    lstm = model.encoder["lstm"]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    report = lstmcore.patch(model, backend="numba")
    assert report["alias"] is report["encoder.lstm"]
    assert report["alias"].names == ("encoder.lstm", "alias")
    assert model.hidden[0] is model.alias is lstm
    assert type(lstm) is lstmcore.LSTM
    before = lstm.weight_hh_l0.detach().clone()
    model(X).sum().backward()
    optimizer.step()
    assert not torch.equal(lstm.weight_hh_l0, before)


def test_training_goes_on_as_before():
    """Moved between two steps of an optimizer with momentum."""
    losses = []
    for move in (False, True):
        torch.manual_seed(0)
        model, target = Model().double(), torch.randn(3, 1, dtype=torch.double)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(6):
            if move and step == 3:
                lstmcore.patch(model, backend="numba")
            optimizer.zero_grad()
            loss = (model(X.double()) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    for got, expected in zip(losses[6:], losses[:6], strict=True):
        close(got, expected)


def test_cells():
    model = models.Cells()
    expected = models.results(model, X)
    report = lstmcore.patch(model, backend="numba", recompute=5)
    assert report.moved == ["cell"]
    assert type(model.cell) is lstmcore.LSTMCell
    assert "recompute" not in vars(model.cell)
    for got, wanted in zip(models.results(model, X), expected, strict=True):
        close(got, wanted)
    lstmcore.unpatch(model)
    assert type(model.cell) is nn.LSTMCell
    lstmcore.patch(model, subclass=True)
    assert type(model.cell) is classes.LSTMCell


# ---------------------------------------------------------------------------------------------------- what is left, why


class Other(nn.LSTM):
    backend = "mine"


class TakenForward(nn.LSTM):
    forward = torch.relu


def wrapped() -> nn.LSTM:
    lstm = nn.LSTM(I, H)
    before = lstm.forward
    lstm.forward = lambda *args: before(*args)
    return lstm


class BothWays(nn.LSTM):
    """One branch that would be ours, and one that would stay torch's."""

    def forward(self, input, hx=None):
        if self.training:
            return super().forward(input, hx)
        return nn.LSTM.forward(self, input, hx)


class Calling(nn.LSTM):
    def __call__(self, input):
        return input.new_ones(*input.shape[:2], self.hidden_size), None


class Noisy(nn.LSTM):
    """Torch's forward asks for these."""

    @property
    def _flat_weights(self):
        return [2 * weight for weight in vars(self)["kept"]]

    @_flat_weights.setter
    def _flat_weights(self, weights):
        vars(self)["kept"] = weights


class OfInstance(nn.LSTM):
    """Would call itself without end once an instance is of a derived class."""

    def forward(self, input, hx=None):
        return super(self.__class__, self).forward(input, hx)


class OfType(nn.LSTM):
    def reset_parameters(self):
        super(type(self), self).reset_parameters()


def helper() -> nn.LSTM:
    lstm = nn.LSTM(I, H)
    lstm.permute_hidden = lambda hx, permutation: hx
    return lstm


def attribute() -> nn.LSTM:
    lstm = nn.LSTM(I, H)
    lstm.recompute = 3
    return lstm


class ConvLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 1)


LEFT = {
    "replaced": (lambda: models.Replaced(I, H), "the forward of .*Replaced replaces torch's"),
    "by name": (lambda: models.ByName(I, H), "calls torch's by its class: write super"),
    "helper": (lambda: models.Permuting(I, H), "replaces permute_hidden, which torch's forward uses"),
    "branch": (lambda: BothWays(I, H), "calls torch's by its class: write super"),
    "call": (lambda: Calling(I, H), "the __call__ of .*Calling replaces torch's"),
    "weights": (lambda: Noisy(I, H), "replaces _flat_weights, which torch's forward uses"),
    "class of the instance": (lambda: OfInstance(I, H), r"super\(\) of its instance's class.*: write super"),
    "type of the instance": (lambda: OfType(I, H), r"write super\(\)\.reset_parameters"),
    "helper of the instance": (helper, "its permute_hidden was replaced on the instance"),
    "attribute of the class": (lambda: Other(I, H), "has backend of its own"),
    "attribute": (attribute, "has recompute of its own"),
    "no Python": (lambda: TakenForward(I, H), "is not a Python function"),
    "wrapped forward": (wrapped, "replaced on the instance"),
    "scripted": (lambda: torch.jit.script(nn.LSTM(I, H)), "torch.jit.script: patch the model before"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_with_a_reason(name):
    make, reason = LEFT[name]
    model = nn.ModuleDict({"a": nn.LSTM(I, H), "b": make()})
    before = state(model["b"])
    with pytest.raises(RuntimeError, match=f"1 of 2 LSTMs cannot move.*\n  b, .*{reason}"):
        lstmcore.patch(model, strict=True)
    assert type(model["a"]) is nn.LSTM  # all or nothing
    report = lstmcore.patch(model)
    assert report.moved == ["a"]
    assert list(report.left) == ["b"]
    assert re.search(reason, report.left["b"])
    assert report.left["b"] in str(report)
    assert state(model["b"]) == before


def test_quantised():
    quantised = pytest.importorskip("torch.ao.nn.quantized.dynamic", reason="this torch has no torch.ao")
    model = nn.ModuleDict({"a": nn.LSTM(I, H)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            moved = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
        except RuntimeError as error:
            pytest.skip(f"this build of torch does not quantise: {error}")
    assert isinstance(moved["a"], quantised.LSTM)
    assert "quantised" in lstmcore.patch(moved).left["a"]


def test_sharded_is_left():
    """A class that torch.distributed made: FSDP's code counts on its place among the bases."""
    place = {"__module__": "torch.distributed.fsdp"}
    sharded = types.new_class("FSDPLSTM", (nn.LSTM,), exec_body=lambda body: body.update(place))
    assert "sharded" in lstmcore.patch(sharded(I, H)).left[""]


def test_a_class_that_python_cannot_make():
    class Meta(type):
        def __new__(mcls, name, bases, body):
            if len(bases) > 1:
                raise TypeError("only one base")
            return super().__new__(mcls, name, bases, body)

    class Picky(nn.LSTM, metaclass=Meta):
        pass

    (reason,) = lstmcore.patch(Picky(I, H)).left.values()
    assert reason == "a class of its own and lstmcore's is impossible: TypeError: only one base"


class Registered(nn.LSTM):
    """A class that wraps the forward of each class derived from it, and wants an argument of it."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, factor: float) -> None:
        Registered.known[cls.__name__] = cls
        before = cls.forward

        @functools.wraps(before)
        def forward(self, *args):
            output, states = before(self, *args)
            return output * factor, states

        cls.forward = forward


class Tripled(Registered, factor=3.0):
    def forward(self, input, hx=None):
        return super().forward(input, hx)


def test_code_for_derived_classes_does_not_run():
    model = nn.Sequential(Tripled(I, H))
    expected = model(X)[0]
    lstmcore.patch(model, strict=True)
    close(model(X)[0], expected)
    assert Registered.known == {"Tripled": Tripled}
    lstmcore.unpatch(model)
    assert type(model[0]) is Tripled


def test_a_class_that_cannot_be_made():
    class Once(type):
        names: ClassVar[set[str]] = set()

        def __init__(cls, name, bases, contents):
            if name in Once.names:
                raise KeyError(f"{name} twice")
            Once.names.add(name)

    class Unique(nn.LSTM, metaclass=Once):
        pass

    module = Unique(I, H)
    assert "KeyError: 'Unique twice'" in lstmcore.patch(module).left[""]
    assert type(module) is Unique


def test_attributes_that_cannot_be_set():
    class Sealed(nn.LSTM):
        def __setattr__(self, name, value):
            if "sealed" in vars(self):
                raise AttributeError(f"sealed: {name}")
            super().__setattr__(name, value)

    module = Sealed(I, H)
    vars(module)["sealed"] = True
    expected, before = results_of(module), state(module)
    lstmcore.patch(module, strict=True, backend="numba")
    close(results_of(module)[0], expected[0])
    lstmcore.unpatch(module)
    assert state(module) == before


def test_attributes_of_ones_own_stay():
    module = nn.LSTM(I, H)
    module._moved = 3
    before = state(module)
    lstmcore.patch(module)
    assert module._moved == 3
    lstmcore.unpatch(module)
    assert state(module) == before


def test_a_class_with_slots_moves_or_stays_whole():
    class Slots(nn.LSTM):
        __slots__ = ("extra",)

    model = nn.ModuleList([nn.LSTM(I, H), Slots(I, H)])
    model[1].extra = 3
    report = lstmcore.patch(model)
    assert set(report.moved) | set(report.left) == {"0", "1"}
    assert model[1].extra == 3
    lstmcore.unpatch(model)
    assert type(model[1]) is Slots


def test_another_implementation_is_no_obstacle():
    model = nn.ModuleDict({"a": nn.LSTM(I, H), "b": ConvLSTM()})
    report = lstmcore.patch(model, strict=True)
    assert report.moved == ["a"]
    assert "does not derive from torch.nn.LSTM" in report.left["b"]


def test_ours_stay():
    model = nn.ModuleDict({"a": lstmcore.LSTM(I, H, forget_bias=1.0), "b": nn.LSTM(I, H)})
    report = lstmcore.patch(model, strict=True, subclass=True)
    assert report.moved == ["b"]
    assert "installed(subclass=True)" in report["a"].why
    report = lstmcore.unpatch(model)
    assert report.moved == ["b"]
    assert "not moved by patch" in report.left["a"]
    assert type(model["a"]) is lstmcore.LSTM
    assert str(lstmcore.patch(lstmcore.LSTM(I, H))).startswith("0 of 1 LSTMs moved, 1 lstmcore's already\n")


def test_twice_is_once():
    model = Model()
    lstmcore.patch(model, backend="numba")
    again = lstmcore.patch(model, backend="reference")
    assert not again.moved
    assert model.alias.backend == "numba"
    lstmcore.unpatch(model)
    assert not lstmcore.unpatch(model).moved


def test_a_module_that_is_held_twice_has_all_its_names():
    shared = nn.Sequential(nn.LSTM(I, H))
    model = nn.ModuleDict({"a": shared, "b": shared})
    shared.owner = model  # and holds what holds it
    assert lstmcore.patch(model, only="b.0").moved == ["a.0"]
    assert lstmcore.unpatch(model)["b.0"].names == ("a.0", "b.0")


def test_modules_that_answer_to_every_name():
    class Answering(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(I, H)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return lambda: name

    assert lstmcore.patch(Answering()).moved == ["lstm"]


def test_two_that_are_only_named_so_and_hold_each_other():
    class MyLSTM(nn.Module):
        pass

    first, second = MyLSTM(), MyLSTM()
    first.other, second.other = second, first
    first.lstm = nn.LSTM(I, H)
    assert lstmcore.patch(first).moved == ["lstm"]


def test_a_forward_that_was_kept_is_told():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(I, H)
            self.step = self.lstm.forward

        def forward(self, x):
            return self.step(x)

    report = lstmcore.patch(nn.Sequential(Keeping()), input=X)
    assert report.moved == ["0.lstm"]
    assert "0 keeps its forward as step, which stays torch's" in str(report)
    assert "not called" not in str(report)


def test_a_kept_forward_of_a_subclass_follows():
    """Its ``super()`` means what the instance is."""
    model = nn.Sequential(models.Doubled(I, H))
    model.step = model[0].forward
    model.named = types.MethodType(partial(lambda module: None), model)
    assert not lstmcore.patch(model, backend="numba")["0"].why
    with torch.no_grad():
        assert lstmcore.explain(model, X)["0"].calls[0].ours
        assert torch.equal(model.step(X)[0], model(X)[0])


def test_what_cannot_go_back_says_so():
    model = nn.ModuleList([nn.LSTM(I, H), nn.LSTM(I, H), models.Doubled(I, H)])
    lstmcore.patch(model)
    before = model[0].forward
    model[0].forward = lambda *args: before(*args)
    for index in (1, 2):
        cls = type(model[index])
        model[index].__class__ = type("Sharded", (models.Mixin, cls), {})
    report = lstmcore.unpatch(model)
    assert report.title == "0 of 3 LSTMs moved back"
    assert "its forward was replaced on the instance since" in report.left["0"]
    assert "its class was changed since" in report.left["1"]
    assert "its class was changed since" in report.left["2"]
    assert model[0](X)[0].shape == (7, 3, H)
    del model[0].forward
    model[1].__class__, model[2].__class__ = (type(model[index]).__bases__[1] for index in (1, 2))
    assert lstmcore.unpatch(model).moved == ["0", "1", "2"]


# ------------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("only", "moved"),
    [("a", ["a"]), ("in.*", ["in.b"]), (["a", "in.?"], ["a", "in.b"]), ("*", ["a", "in.b"]), ([], [])],
)
def test_only(only, moved):
    model = nn.ModuleDict({"a": nn.LSTM(I, H), "in": nn.ModuleDict({"b": nn.LSTM(I, H)})})
    assert lstmcore.patch(model, only=only).moved == moved
    assert [name for name, each in model.named_modules() if isinstance(each, lstmcore.LSTM)] == moved


def test_only_what_is_there():
    with pytest.raises(ValueError, match=r"only='x' matches no LSTM of this model: there are 'encoder.lstm', 'alias'"):
        lstmcore.patch(Model(), only=["alias", "x"])
    with pytest.raises(ValueError, match="there are none"):
        lstmcore.patch(nn.Linear(1, 1), only="x")


def test_dry_run_changes_nothing():
    model = Model()
    before = state(model)
    for options in ({}, {"input": X}):
        report = lstmcore.patch(model, dry_run=True, **options)
        assert report.moved == ["encoder.lstm"]
        assert "would move" in str(report)
        assert state(model) == before
    assert report["alias"].calls[0].choice.name in str(report)


def test_input_shows_what_runs():
    model = Model().eval()
    report = lstmcore.patch(model, input=X, backend="reference")
    (call,) = report["alias"].calls
    assert (call.times, call.choice.name, call.shape) == (1, "reference", f"(7, 3, {I}) float32")
    assert type(model.alias) is lstmcore.LSTM


def test_a_failed_run_moves_nothing():
    model = Model()
    before = state(model)
    with pytest.raises(RuntimeError, match=r"input\.size\(-1\)"):
        lstmcore.patch(model, input=torch.randn(7, 3, I + 1))
    assert state(model) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "cudnn"}, ValueError, "backend"),
        ({"recompute": 0}, ValueError, "recompute"),
        ({"recompute": "often"}, TypeError, "recompute"),
        ({"memory_budget": 5}, ValueError, "memory_budget"),
    ],
)
def test_bad_options(options, error, message):
    model = Model()
    with pytest.raises(error, match=message):
        lstmcore.patch(model, **options)
    assert type(model.alias) is nn.LSTM


@pytest.mark.parametrize("function", [lstmcore.patch, lstmcore.unpatch])
@pytest.mark.parametrize("thing", [None, [nn.LSTM(1, 1)], nn.LSTM, "model"], ids=["None", "list", "class", "str"])
def test_only_modules(function, thing):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got .*: pass the module that it trains"):
        function(thing)


def test_no_lstm():
    report = lstmcore.patch(nn.GRU(I, H), strict=True)
    assert len(report) == 0
    assert str(report) == "there is no LSTM in this model"


# -------------------------------------------------------------------------------------------- copies, pickles, compiled


@pytest.mark.parametrize("subclass", [False, True], ids=["", "subclass"])
@pytest.mark.parametrize(
    "make", [nn.LSTM, partial(models.Doubled, factor=3.0), models.Mixed], ids=["", "Doubled", "Mixed"]
)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, "pickle", "torch.save"], ids=["deepcopy", "copy", "pickle", "torch.save"]
)
def test_copies(copied, make, subclass):
    module = make(I, H).eval()
    theirs = type(module)
    lstmcore.patch(module, subclass=subclass, backend="numba")
    if copied == "pickle":
        other = [pickle.loads(pickle.dumps(module, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)][-1]
    elif copied == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copied(module)
    assert type(other) is type(module)
    assert other.backend == "numba"
    for got, expected in zip(results_of(other), results_of(module), strict=True):
        assert torch.equal(got, expected)
    lstmcore.unpatch(other)
    assert type(other) is theirs


class Rebuilt(nn.LSTM):
    """Copies and pickles itself in its own way, by the class that it has."""

    def __reduce__(self):
        return type(self), (self.input_size, self.hidden_size), self.__getstate__()

    def clone(self) -> Rebuilt:
        other = type(self)(self.input_size, self.hidden_size)
        other.load_state_dict(self.state_dict())
        return other


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled, Rebuilt.clone])
def test_copies_of_a_kind_of_its_own(copied):
    module = Rebuilt(I, H)
    lstmcore.patch(module)
    other = copied(module)
    assert type(other) is type(module)
    close(other(X)[0], module(X)[0])
    assert lstmcore.unpatch(other).moved == [""]
    assert type(other) is Rebuilt


def test_one_class_for_each():
    first, second = models.Doubled(I, H), models.Doubled(I, H)
    lstmcore.patch(nn.ModuleList([first, second]))
    assert type(first) is type(second)
    assert type(first).__name__ == "Doubled"
    assert repr(first) == repr(models.Doubled(I, H))


def test_classes_do_not_outlive_their_modules():
    class Local(nn.LSTM):
        pass

    module = Local(I, H)
    lstmcore.patch(module)
    assert classes._made[Local] is type(module)
    lstmcore.unpatch(module)
    del module
    gc.collect()
    assert Local not in classes._made


@pytest.mark.parametrize("subclass", [False, True], ids=["", "subclass"])
def test_scripting(subclass):
    model = nn.Sequential(nn.LSTM(I, H))
    lstmcore.patch(model, subclass=subclass)
    close(torch.jit.script(model)(X)[0], model(X)[0])


def test_fx():
    model = nn.Sequential(nn.LSTM(I, H), Output())
    lstmcore.patch(model)
    close(torch.fx.symbolic_trace(model)(X), model(X))


@pytest.mark.parametrize("derived", [True, False], ids=["moved", "ours"])
def test_fx_of_a_subclass_with_a_forward(derived):
    """A node for the whole module, in the middle of its forward, would run that twice."""

    class Ours(lstmcore.LSTM):
        def forward(self, input, hx=None):
            output, states = super().forward(input, hx)
            return output * 2, states

    model = nn.Sequential((models.Doubled if derived else Ours)(I, H), Output())
    lstmcore.patch(model)
    with pytest.raises(torch.fx.proxy.TraceError, match=r"cannot be traced through the LSTM.*is_leaf_module"):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, lstmcore.LSTM) or super().is_leaf_module(module, name)

    close(torch.fx.GraphModule(model, Tracer().trace(model))(X), model(X))


def test_compiled_models_follow():
    """What was compiled before is compiled again, in one graph once it is ours."""
    model = nn.Sequential(nn.LSTM(I, H), Output())
    counter = Counter()
    compiled = torch.compile(model, backend=counter)
    expected = compiled(X)
    assert not counter.operators
    lstmcore.patch(compiled)
    close(compiled(X), expected)
    assert counter.operators == {"lstmcore.layer"}
    lstmcore.unpatch(compiled)
    counter.operators.clear()
    close(compiled(X), expected)
    assert not counter.operators


@pytest.mark.parametrize("how", ["subclass", "derived", "installed"])
def test_a_graph_breaks_at_a_torch_lstm_and_not_inside_of_it(how):
    """torch.compile refuses what is an instance of torch.nn.LSTM; it must not go on in our host code instead."""
    if how == "derived" and not compiles(models.Doubled(I, H)):
        pytest.skip("this torch's compiler fails at torch's own class, if a class is derived from it")
    model = nn.Sequential(models.Doubled(I, H) if how == "derived" else nn.LSTM(I, H), Output())
    lstmcore.patch(model, subclass=how == "subclass")
    expected, counter = model(X), Counter()
    torch.compiler.reset()
    try:
        if how == "installed":
            lstmcore.install()
        compiled = torch.compile(model, backend=counter)
        close(compiled(X), expected)
        assert counter.graphs <= 2, counter.operators
    finally:
        lstmcore.uninstall()
    torch.compiler.reset()
    if how == "installed":  # which is over
        close(torch.compile(model, backend=counter, fullgraph=True)(X), expected)
        assert "lstmcore.layer" in counter.operators


def compiles(module: nn.Module) -> bool:
    """torch 2.15's compiler does not get over the call of torch's forward by ``super()``."""
    torch.compiler.reset()
    try:
        torch.compile(module, backend=Counter())(X)
    except torch._dynamo.exc.InternalTorchDynamoError:
        return False
    return True


class Output(nn.Module):
    def forward(self, found):
        return found[0]


class Counter:
    """A backend of torch.compile that counts graphs and our operators in them."""

    def __init__(self) -> None:
        self.graphs, self.operators = 0, set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> object:
        self.graphs += 1
        self.operators |= {str(node.target) for node in graph.graph.nodes if "lstmcore" in str(node.target)}
        return graph.forward
