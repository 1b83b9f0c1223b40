"""Initialisations that remember: ``lstmcore.init``, and the constructor's ``forget_bias`` and ``chrono``."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lstmcore
from lstmcore.init import chrono_, forget_bias_

from ..support.tolerances import ORDER_OF_SUMS, error

H = 5
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 3, "proj_size": 2, "batch_first": True}]
GIVEN = [{"forget_bias": 1.5}, {"forget_bias": -2.0}, {"chrono": 3}, {"chrono": 200}]
FUNCTIONS = {"forget_bias": forget_bias_, "chrono": chrono_}


def seeded(cls=lstmcore.LSTM, seed=5, **kwargs):
    torch.manual_seed(seed)
    return cls(3, H, **kwargs)


def gates(module: nn.Module, which: str) -> list[tuple[torch.Tensor, ...]]:
    """The parts i, f, g, o of ``which`` of the two biases, for every layer and direction."""
    return [p.detach().chunk(4) for name, p in module.named_parameters() if name.startswith(which)]


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def check_set(module: nn.Module, given: dict) -> None:
    """The gates' biases are what ``given`` says, in every layer and direction."""
    places = module.num_layers * (1 + module.bidirectional)
    ih, hh = gates(module, "bias_ih"), gates(module, "bias_hh")
    assert len(ih) == len(hh) == places
    for (i, f, _, _), (hi, hf, _, _) in zip(ih, hh, strict=True):
        assert not hf.any()
        if "forget_bias" in given:
            assert (f == given["forget_bias"]).all()
        else:
            assert torch.equal(i, -f)
            assert not hi.any()
            assert (f >= 0).all()
            assert (f <= math.log(given["chrono"] - 1)).all()
            assert f.unique().numel() == H


@pytest.mark.parametrize("cls", [lstmcore.LSTM, nn.LSTM])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_only_these_gates_are_set(given, options, cls):
    """The rest has the bits that torch gives it from the same seed; so has everything, without the arguments."""
    plain = seeded(nn.LSTM, **options)
    assert same(seeded(**options), plain)
    if cls is lstmcore.LSTM:
        module = seeded(**options, **given)
    else:
        (name, value), module = *given.items(), seeded(cls, **options)
        assert FUNCTIONS[name](module, value) is module
    check_set(module, given)
    kept = (2, 3) if "chrono" in given else (0, 2, 3)
    for name, expected in plain.named_parameters():
        got = module.get_parameter(name)
        if name.startswith("bias"):
            for gate in kept:
                assert torch.equal(got.chunk(4)[gate], expected.chunk(4)[gate]), name
        else:
            assert torch.equal(got, expected), name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_argument_is_the_function_after_construction(given, options):
    ((name, value),) = given.items()
    module = seeded(**options, **given)
    after = torch.rand(3)
    assert same(module, FUNCTIONS[name](seeded(**options), value))
    assert torch.equal(after, torch.rand(3)), "a different number of random values was drawn"


@pytest.mark.parametrize("given", [{"forget_bias": 2.5}, {"chrono": 50}], ids=str)
def test_the_forget_gate_is_what_was_set(given):
    """By torch's cell: with weights of zero and no candidate, c_1 / c_0 is the forget gate, and i opens by the rest."""
    module, cell = seeded(**given, dtype=torch.float64), nn.LSTMCell(3, H, dtype=torch.float64)
    with torch.no_grad():
        for name in ("bias_ih", "bias_hh"):
            getattr(cell, name).copy_(getattr(module, f"{name}_l0"))
            getattr(cell, name).view(4, H)[2].zero_()
        cell.weight_ih.zero_(), cell.weight_hh.zero_()
        c_0 = torch.ones(1, H, dtype=torch.float64)
        kept = cell(c_0[:, :3], (0 * c_0, c_0))[1]
        cell.bias_ih.view(4, H)[2].fill_(40.0)  # a candidate of one
        entered = cell(c_0[:, :3], (0 * c_0, 0 * c_0))[1]
    if "forget_bias" in given:
        assert error(kept, torch.full_like(kept, 1 / (1 + math.exp(-2.5)))) < ORDER_OF_SUMS
    else:
        lags = kept / (1 - kept)
        assert ((lags >= 1) & (lags <= 49)).all()
        assert error(entered, 1 - kept) < ORDER_OF_SUMS


def test_lags_are_uniform():
    u = gates(chrono_(lstmcore.LSTM(1, 4000, dtype=torch.float64), 101), "bias_ih")[0][1].exp()
    assert u.min() < 1.2
    assert u.max() > 99.8
    assert abs(u.mean() - 50.5) < 5 * 99 / math.sqrt(12 * 4000)
    assert abs(u.std() - 99 / math.sqrt(12)) < 2


def test_generator_of_ones_own():
    first, state = seeded(seed=1), torch.get_rng_state()
    chrono_(first, 100, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)
    second = chrono_(seeded(seed=2), 100, torch.Generator().manual_seed(7))
    assert torch.equal(gates(first, "bias_ih")[0][1], gates(second, "bias_ih")[0][1])


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_loading_keeps_what_is_loaded(given, assign):
    options = OPTIONS[1]
    ours, theirs = seeded(**options, **given), seeded(nn.LSTM, seed=6, **options)
    for source, target in ((theirs, seeded(**options, **given)), (ours, seeded(nn.LSTM, **options)), (ours, theirs)):
        expected = copy.deepcopy(source.state_dict())
        assert target.load_state_dict(source.state_dict(), strict=True, assign=assign) == ([], [])
        assert list(target.state_dict()) == list(expected)
        assert all(torch.equal(value, expected[name]) for name, value in target.state_dict().items())


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("given", [{}, *GIVEN[1:3]], ids=str)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["deepcopy", "copy", "pickle", "save"],
)
def test_copies_keep_values_and_arguments(copied, given):
    module = seeded(**given)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.arange(p.numel()).view_as(p))
    state = torch.get_rng_state()
    twin = copied(module)
    assert same(twin, module)
    assert torch.equal(torch.get_rng_state(), state), "copying drew random values"
    assert repr(twin) == repr(module)
    torch.manual_seed(5)
    twin.reset_parameters()
    assert same(twin, seeded(**given))


def test_pickles_from_before_the_arguments():
    """They hold neither attribute, nor does a module that was not given one."""
    module = seeded()
    assert not {"forget_bias", "chrono"} & set(module.__getstate__())
    assert (module.forget_bias, module.chrono) == (None, None)


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_reset_parameters_applies_it_again(given):
    module = seeded(**OPTIONS[1], **given)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(7.0)
    torch.manual_seed(8)
    module.reset_parameters()
    assert same(module, seeded(seed=8, **OPTIONS[1], **given))


def test_a_changed_attribute_counts_at_the_next_reset():
    module = seeded(forget_bias=1.0)
    module.forget_bias = 3.0
    module.reset_parameters()
    check_set(module, {"forget_bias": 3.0})
    module.chrono = 20
    before = copy.deepcopy(module)
    with pytest.raises(ValueError, match="exclude each other"):
        module.reset_parameters()
    assert same(module, before)
    module.forget_bias = None
    module.reset_parameters()
    check_set(module, {"chrono": 20})


@pytest.mark.parametrize("given", [{}, *GIVEN], ids=str)
def test_meta(given):
    """Built without memory, and initialised where it is then put: what a direct construction gives; nothing drawn."""
    direct, state = seeded(**OPTIONS[1], **given), torch.manual_seed(5).get_state()
    on_argument = lstmcore.LSTM(3, H, **OPTIONS[1], **given, device="meta")
    with torch.device("meta"):
        in_context = lstmcore.LSTM(3, H, **OPTIONS[1], **given)
    skipped = nn.utils.skip_init(lstmcore.LSTM, 3, H, **OPTIONS[1], **given)
    assert torch.equal(torch.get_rng_state(), state)
    for module in (on_argument.to_empty(device="cpu"), in_context.to_empty(device="cpu"), skipped):
        torch.manual_seed(5)
        module.reset_parameters()
        assert same(module, direct)


def test_whatever_the_default_device_is():
    expected, module = chrono_(seeded(), 100), seeded()
    with torch.device("meta"):
        chrono_(module, 100)
    assert same(module, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_dtypes(given, dtype):
    module = seeded(**given, dtype=dtype)
    if "forget_bias" in given or dtype == torch.float64:
        check_set(module, given)
    for i, f, _, _ in gates(module, "bias_ih"):
        assert f.dtype == dtype
        assert "chrono" not in given or torch.equal(i, -f)


def test_numbers_of_other_types():
    module = seeded(forget_bias=np.float32(1.5))
    assert same(module, seeded(forget_bias=1.5))
    assert repr(module) == "LSTM(3, 5, forget_bias=1.5)"
    module = seeded(chrono=np.int64(7))
    assert same(module, seeded(chrono=7))
    assert repr(module) == "LSTM(3, 5, chrono=7)"
    assert repr(seeded(forget_bias=1, backend="numba")) == "LSTM(3, 5, backend='numba', forget_bias=1.0)"
    assert repr(seeded(forget_bias=0.0)) == "LSTM(3, 5, forget_bias=0.0)"
    assert repr(seeded()) == repr(nn.LSTM(3, H))


ERRORS = [
    ({"forget_bias": 1.0, "chrono": 9}, ValueError, "exclude each other"),
    ({"forget_bias": 1.0, "bias": False}, ValueError, "build it with bias=True"),
    ({"chrono": 9, "bias": False}, ValueError, "build it with bias=True"),
    ({"forget_bias": "1"}, TypeError, "type float, got: str"),
    ({"forget_bias": True}, TypeError, "type float, got: bool"),
    ({"forget_bias": torch.ones(())}, TypeError, "type float, got: Tensor"),
    ({"forget_bias": 1j}, TypeError, "type float, got: complex"),
    ({"forget_bias": math.nan}, ValueError, "finite forget bias, got nan"),
    ({"forget_bias": -math.inf}, ValueError, "finite forget bias, got -inf"),
    ({"chrono": 100.0}, TypeError, "type int, got: float"),
    ({"chrono": True}, TypeError, "type int, got: bool"),
    ({"chrono": "100"}, TypeError, "type int, got: str"),
    ({"chrono": 2}, ValueError, "max_lag >= 3, got 2"),
    ({"chrono": -1}, ValueError, "max_lag >= 3, got -1"),
]


@pytest.mark.parametrize(("given", "kind", "message"), ERRORS, ids=str)
def test_errors(given, kind, message):
    """Before anything is drawn; the functions say the same, and leave the module as it was."""
    state = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        lstmcore.LSTM(3, H, **given)
    assert torch.equal(torch.get_rng_state(), state)
    if "bias" in given or len(given) == 1:
        ((name, value),) = [(name, value) for name, value in given.items() if name != "bias"]
        module = seeded(bias=given.get("bias", True))
        before = copy.deepcopy(module)
        with pytest.raises(kind, match=message):
            FUNCTIONS[name](module, value)
        assert same(module, before)


def test_other_errors():
    with pytest.raises(TypeError, match="bias should be of type bool"):  # torch's own
        lstmcore.LSTM(3, H, bias=0, forget_bias=1.0)
    with pytest.raises(TypeError, match="positional argument"):
        lstmcore.LSTM(3, H, 1, True, False, 0.0, False, 0, None, None, 1.0)
    for function, value in ((forget_bias_, 1.0), (chrono_, 9)):
        for module in (nn.GRU(3, H), nn.Linear(3, H), nn.LSTMCell(3, H)):
            with pytest.raises(ValueError, match=r"expected an lstmcore.LSTM or torch.nn.LSTM, got"):
                function(module, value)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


COMPUTED = {
    "parametrized": lambda m, name: parametrize.register_parametrization(m, name, Doubled()),
    "weight_norm": lambda m, name: parametrizations.weight_norm(m, name),
    "old_weight_norm": lambda m, name: nn.utils.weight_norm(m, name),
    "pruned": lambda m, name: prune.l1_unstructured(m, name, 2),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("cls", [lstmcore.LSTM, nn.LSTM])
@pytest.mark.parametrize("change", COMPUTED)
def test_computed_biases_are_refused(change, cls):
    """Writing into them would change nothing, without a word."""
    for name in ("bias_ih_l0", "bias_hh_l1_reverse"):
        module = seeded(cls, **OPTIONS[1])
        COMPUTED[change](module, name)
        before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
        for function, value in ((forget_bias_, 1.0), (chrono_, 9)):
            with pytest.raises(ValueError, match=f"{name} is no parameter"):
                function(module, value)
        if cls is lstmcore.LSTM:
            module.chrono = 9
            with pytest.raises(ValueError, match=f"{name} is no parameter"):
                module.reset_parameters()
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("change", COMPUTED)
def test_computed_weights_are_in_nobodys_way(change):
    module = seeded(chrono=30)
    COMPUTED[change](module, "weight_hh_l0")
    module.reset_parameters()
    check_set(module, {"chrono": 30})
    forget_bias_(module, 2.0)
    check_set(module, {"forget_bias": 2.0})


def test_biases_that_are_buffers_or_frozen():
    """Some freeze them so."""
    module = seeded(forget_bias=1.0)
    bias = module.bias_ih_l0.detach()
    del module.bias_ih_l0
    module.register_buffer("bias_ih_l0", bias)
    module.bias_hh_l0.requires_grad_(False)
    forget_bias_(module, 4.0)
    assert (module.bias_ih_l0.chunk(4)[1] == 4).all()
    assert not module.bias_hh_l0.chunk(4)[1].any()


@pytest.mark.parametrize("given", [{"forget_bias": 1.0}, {"chrono": 20}], ids=str)
def test_training_from_it_is_torchs(given, backend):
    """An initialisation and no more: the biases move as torch.nn.LSTM's do from the same start."""
    ours = lstmcore.LSTM(3, H, 2, **given, dtype=torch.float64, backend=backend)
    theirs = nn.LSTM(3, H, 2, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    before, x = copy.deepcopy(ours), torch.randn(6, 4, 3, dtype=torch.float64)
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            (module(x)[0] - x.mean()).square().mean().backward()
            optimizer.step()
    for (name, got), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert error(got, expected) <= 10 * ORDER_OF_SUMS, name
        assert (got != before.get_parameter(name)).any(), name
