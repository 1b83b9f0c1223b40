"""Lengths that only the device knows, in the Triton backend, interpreted: the results are those of lengths on the host.

Nothing waits for them: shown on torch's "meta" device, whose tensors have no values that anybody could read.

T time, B batch, H hidden, P projection (H where there is none), D directions.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lstmcore.kernels.contract import GateStatistics, Layer, Needs, Rows, Weights
from lstmcore.kernels.gpu import flat_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..support import contract
from ..support import contract_checks as checks
from ..support.contract import Setup, assert_close, call_backward, call_forward, named, pose, solve
from ..support.gpu_designs import use
from ..support.gpu_lengths import Changed, on_device, roomy
from ..support.interpreted import DENSE, PACKED, SHARES, SMALL
from ..support.tolerances import ORDER_OF_SUMS_F32, assert_library

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")

PLAIN = Setup("plain", T=4, B=5, H=9, lengths=(2, 4, 0, 1, 3), dtype=torch.float32)
FIRST = replace(PLAIN, name="batch_first", D=2, batch_first=True, strided=True, cells=False)
PROJ = replace(PLAIN, name="proj", P=4, reset=0.3, batch_first=True, bias=False)
NOTHING = replace(SMALL, name="all_zero", lengths=(0,) * 5)
SETUPS = [
    SMALL,
    NOTHING,
    PLAIN,
    FIRST,
    PROJ,
    replace(SMALL, name="all_full", lengths=(3,) * 5),
    replace(PLAIN, name="one_left", lengths=(0, 0, 0, 0, 2), D=2, reset=1.0),
    replace(PLAIN, name="one_row", B=1, lengths=(2,), D=2),
    replace(PLAIN, name="square", T=2, B=1, H=1, I=1, D=2, lengths=(1,)),  # as many places as directions
]


BOTH = [
    pytest.param(SMALL, on_device, id="small-device"),
    pytest.param(SMALL, roomy, id="small-roomy"),
    pytest.param(FIRST, on_device, id="batch_first-device"),
]


@pytest.fixture
def kernels(triton_kernels):
    return triton_kernels


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_against_oracle(kernels, design, setup):
    """Everything that is returned, the norms of a recording included."""
    checks.check_against_oracle(Changed(kernels), setup, torch.float32)


@pytest.mark.parametrize(("share", "setup"), [("tiles", SMALL), ("stream", FIRST)], ids=str)
def test_shared_in_other_ways(kernels, monkeypatch, share, setup):
    use(monkeypatch, share=SHARES[share])
    checks.check_against_oracle(Changed(kernels), setup, torch.float32)


@pytest.mark.parametrize(("setup", "change"), BOTH)
def test_as_with_lengths_on_the_host(kernels, design, setup, change):
    p = pose(setup)
    assert_close(solve(Changed(kernels, change), p), solve(kernels, p), ORDER_OF_SUMS_F32)


@pytest.mark.parametrize("setup", [SMALL, replace(PLAIN, H=16)], ids=["small", "h16"])
def test_float16(kernels, design, setup):
    checks.check_16_bits_keep_the_state_in_float32(Changed(kernels), setup, torch.float16)


@pytest.mark.parametrize(("setup", "change"), BOTH)
def test_nan_in_padding_stays_there(kernels, design, setup, change):
    """In the input, and in the gradients of outputs and cells."""
    checks.check_nan_in_padding_stays_there(Changed(kernels, change), setup)


@pytest.mark.parametrize("setup", [SMALL, PROJ], ids=str)
def test_nan_in_states_of_rows_without_a_step(kernels, design, setup):
    """They go to where these rows end and begin, and into no product."""
    p, poisoned = pose(setup), pose(setup)
    empty = torch.tensor(setup.lengths) == 0
    for name in ("h_0", "c_0", "grad_h_n", "grad_c_n"):
        poisoned.given[name][:, empty] = torch.nan
    clean, got = solve(Changed(kernels), p), solve(Changed(kernels), poisoned)
    for name in ("h_n", "c_n", "grad h_0", "grad c_0"):
        assert got[name][:, empty].isnan().all(), name
        got[name][:, empty] = clean[name][:, empty]
    contract.assert_same(kernels, got, clean)


@pytest.mark.parametrize(("setup", "dtype"), [(SMALL, torch.bfloat16), (FIRST, torch.float32)], ids=str)
def test_garbage_in_fresh_memory(kernels, design, setup, dtype, request):
    checks.check_garbage_in_fresh_memory(Changed(kernels), setup, dtype, request)


@pytest.mark.parametrize("setup", [SMALL, FIRST], ids=str)
def test_shapes_layouts_and_padding(kernels, design, setup):
    checks.check_shapes_layouts_and_padding(Changed(kernels), setup)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, which interprets
@pytest.mark.parametrize("setup", [SMALL, PLAIN], ids=str)
def test_padding_reads_zero_beside_weights_that_are_infinite(kernels, design, setup):
    p = pose(setup)
    p.given["grad_h_n"] = None
    for weights in p.given_weights:
        for w in weights:
            if w is not None:
                w.view(-1)[0] = torch.inf
    got = solve(Changed(kernels), p)
    assert not got["output"].isfinite().all(), "the test feeds nothing that shows"
    for name in ("output", "cells", "grad input"):
        assert not got[name][~p.alive].any(), name
    assert not got["norms"][:, :, ~p.alive].any()
    assert not got["grad h_0"][:, torch.tensor(setup.lengths) == 0].any()


def test_inference_gives_the_same_bits(kernels, design):
    checks.check_inference_saves_nothing_and_gives_the_same_bits(Changed(kernels), SMALL)


def test_backward_twice_and_inputs_untouched(kernels, design):
    checks.check_backward_twice_and_inputs_untouched(Changed(kernels), SMALL)


@pytest.mark.parametrize("given", ["grad_output", "grad_h_n", "grad_c_n", "grad_cells"])
def test_missing_gradients_are_zeros(kernels, monkeypatch, given):
    use(monkeypatch, "resident")
    checks.check_missing_gradients_are_zeros(Changed(kernels), SMALL, given)


@pytest.mark.parametrize("off", [(), *Needs._fields, Needs._fields], ids=str)
def test_needs(kernels, monkeypatch, off):
    use(monkeypatch, "resident")
    checks.check_needs(Changed(kernels), SMALL, off)


@pytest.mark.parametrize("state", ["h_0", "c_0"])
def test_missing_states_are_zeros(kernels, monkeypatch, state):
    use(monkeypatch, "resident")
    p, zeros = pose(SMALL), pose(SMALL)
    p.given[state], zeros.given[state] = None, torch.zeros_like(zeros.given[state])
    assert_close(solve(Changed(kernels), p), solve(Changed(kernels), zeros), ORDER_OF_SUMS_F32)


@pytest.mark.parametrize("wanted", [1, 3, 100])
@pytest.mark.parametrize("setup", [SMALL, FIRST], ids=str)
def test_gate_statistics(kernels, monkeypatch, setup, wanted):
    """Over the rows that would be looked at with lengths on the host."""
    use(monkeypatch, "resident")
    p = pose(setup)
    got, expected = (
        call_backward(each, p, call_forward(each, p), gate_rows=wanted).gates for each in (Changed(kernels), kernels)
    )
    for name, one, other in zip(GateStatistics._fields, got, expected, strict=True):
        assert one.shape == other.shape, name
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0, msg=name)


def test_gate_statistics_of_nothing(kernels, monkeypatch):
    """Only a host that knew it could have left this call to others."""
    use(monkeypatch, "resident")
    p = pose(NOTHING)
    gates = call_backward(Changed(kernels), p, call_forward(Changed(kernels), p), gate_rows=3).gates
    assert not any(each.any() for each in gates)
    assert gates.sums.shape == (3, 2, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16], ids=str)
def test_integers_of_any_kind(kernels, monkeypatch, dtype):
    use(monkeypatch, "resident")
    p = pose(SMALL)
    given: list[Tensor] = []

    def change(rows: Rows) -> Rows:
        rows = on_device(rows)
        given.append(rows.lengths.to(dtype))
        return replace(rows, lengths=given[-1])

    contract.assert_same(kernels, solve(Changed(kernels, change), p), solve(Changed(kernels), p))
    assert all(lengths.tolist() == list(SMALL.lengths) for lengths in given)


@pytest.mark.parametrize("batch_first", [False, True])
def test_order_of_rows(batch_first):
    """What is alive lies as with lengths on the host; the tail behind it is all of the padding, once."""
    lengths = torch.tensor([3, 0, 5, 5, 1, 0, 2])
    host = flat_rows.FlatRows(Rows.from_lengths(lengths, 6, batch_first), CPU, None)
    there = flat_rows.FlatRows(Rows(6, 7, lengths=lengths, batch_first=batch_first), CPU, None)
    assert torch.equal(there.order, host.order)
    assert torch.equal(there.offsets, host.offsets)
    assert torch.equal(there.index[: host.total], host.index)
    assert torch.equal(there.index.sort().values, torch.arange(6 * 7))
    assert there.tail.squeeze(1).tolist() == [False] * host.total + [True] * (6 * 7 - host.total)
    assert there.sample(3).tolist() == host.sample(3).tolist() == [0, 1, 2]  # of the five that have a step
    assert there.users(there.sample(9)).tolist() == [2, 3, 0, 6, 4]


@pytest.mark.parametrize("change", [on_device, roomy, lambda rows: rows], ids=["device", "roomy", "host"])
@pytest.mark.parametrize("setup", [SMALL, FIRST], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_saves(kernels, design, setup, change, dtype):
    """What forward saves has the shapes that are promised; where they have room, they depend on no length."""
    p = pose(replace(setup, dtype=dtype))
    s, rows = setup, change(p.rows)
    forward = call_forward(Changed(kernels, change), p)
    layer = Layer(CPU, dtype, s.T, s.B, s.I, s.H, s.P, s.D, ragged=True, training=True)
    assert [(tuple(t.shape), t.dtype) for t in forward.saved] == kernels.saves(layer, rows.room)
    assert all(t.is_contiguous() for t in forward.saved)
    assert rows.room == (s.T * s.B if rows is not p.rows else sum(s.lengths))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_room_for_nothing_else(kernels, monkeypatch, packed):
    """Rows that have no padding: asking for room changes nothing."""
    use(monkeypatch, "resident")
    p = pose(PACKED if packed else DENSE)
    contract.assert_same(kernels, solve(Changed(kernels, roomy), p), solve(kernels, p))


WRONG = {"above": 4, "far_above": 2**40, "negative": -1, "far_below": -(2**40)}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("setup", [SMALL, replace(SMALL, P=0, D=1, reset=0.0)], ids=["small", "plain"])
def test_lengths_out_of_range(kernels, design, setup, value):
    """All of such a row is NaN, resets or not; the others are right, and a later call tells."""
    p, row = pose(setup), 1
    if setup.reset:
        p.given["reset"][1, row] = True
    expected = named(p, call_forward(Changed(kernels), p), None)

    def change(rows: Rows) -> Rows:
        rows = on_device(rows)
        rows.lengths[row] = value
        return rows

    got = named(p, call_forward(Changed(kernels, change), p), None)
    others = [b for b in range(setup.B) if b != row]
    for name, values in got.items():
        assert values[:, row].isnan().all(), name
        assert_library(values[:, others], expected[name][:, others], name)
    match = r"lengths should be from 0 to T.*an earlier call on cpu.*NaN.*lengths\.cpu\(\)"
    with pytest.raises(ValueError, match=match):
        call_forward(kernels, p)
    contract.assert_same(kernels, named(p, call_forward(Changed(kernels), p), None), expected)  # told once, and over


def test_gradients_of_lengths_out_of_range(kernels, design):
    """Where backward is not told in time, what it returns of the row, and of what all rows share, is NaN."""
    p, clean = pose(SMALL), pose(SMALL)
    expected = solve(Changed(kernels), clean)

    def change(rows: Rows) -> Rows:
        rows = on_device(rows)
        rows.lengths[1] = 4
        return rows

    forward = call_forward(Changed(kernels, change), p)
    kernels.status._reported[CPU] = kernels.status._wrong_lengths[CPU][1].item()  # as if the host had not seen it yet
    got = named(p, forward, call_backward(Changed(kernels, change), p, forward))
    others = [0, 2, 3, 4]
    for name in ("grad input", "grad h_0", "grad c_0"):
        assert got[name][:, 1].isnan().all(), name
        assert_library(got[name][:, others], expected[name][:, others], name)
    for name in Weights._fields:
        assert got[f"grad {name} 0"].isnan().any(), name


def test_a_good_call_hides_no_bad_one(kernels):
    """What the host did not see yet stays to be seen, whatever is done in between."""
    status = kernels.status
    good, bad = torch.zeros(3, 1, dtype=torch.bool), torch.tensor([[False], [True], [True]])
    for sequence in ((bad, good), (good, bad, good, good), (bad, bad)):
        for each in sequence:
            status.note(CPU, each)
        with pytest.raises(ValueError, match="lengths"):
            status.raise_pending(CPU)
        status.raise_pending(CPU)
        status.note(CPU, good)
        status.raise_pending(CPU)


def test_the_first_call_in_inference_mode(kernels, monkeypatch):
    """What is kept of it can be written to outside of the mode."""
    use(monkeypatch, "resident")
    p = pose(SMALL)
    with torch.inference_mode():
        first = call_forward(Changed(kernels), p, save=False)
    assert_library(call_forward(Changed(kernels), p).output, first.output)


META = torch.device("meta")
aten = torch.ops.aten


class NothingWaits(TorchDispatchMode):
    """Raises where something is copied between the host and the meta device, which is what a wait would be for.

    Reading values of the device, by whatever way, raises by itself there.  Allowed are the copies of a count to where
    the host reads it, which do not block; they are counted.
    """

    def __init__(self, status) -> None:
        super().__init__()
        self.status, self.reports = status, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.copy_.default and {t.device for t in args[:2]} == {CPU, META}:
            count, copy = self.status._wrong_lengths.get(META, (None, None))
            assert args[0] is copy, "a copy between host and device"
            assert args[1] is count, "a copy between host and device"
            assert args[2] is True, "a copy that blocks"
            self.reports += 1
            return args[0]
        result = func(*args, **kwargs)
        given = {t.device for t in args if isinstance(t, Tensor)}
        if isinstance(result, Tensor) and given and not func.is_view:
            assert given == {result.device}, f"{func} takes tensors on {given} to {result.device}"
        assert func.overloadpacket not in (aten.repeat_interleave,) or kwargs.get("output_size") is not None, func
        return result


@pytest.fixture
def waiting(kernels, monkeypatch) -> NothingWaits:
    """A device without values: nothing is launched there."""
    monkeypatch.setattr(kernels.launch.Recurrence, "launch", lambda *args, **options: None)
    for name in ("tensor", "as_tensor"):  # the mode does not see these
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *values, _make=make, **options: on_host(_make(*values, **options)))
    return NothingWaits(kernels.status)


def on_host(tensor: Tensor) -> Tensor:
    assert tensor.device == CPU, "values of the host's, copied to the device"
    return tensor


def moved(setup: Setup) -> contract.Problem:
    """``setup`` on the meta device."""
    p = pose(setup)
    p.given = {name: None if value is None else value.to(META) for name, value in p.given.items()}
    p.given_weights = tuple(Weights(*(None if w is None else w.to(META) for w in each)) for each in p.given_weights)
    return p


@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize("setup", [SMALL, PLAIN, FIRST, PROJ, replace(SMALL, name="segments", segment=2)], ids=str)
def test_nothing_waits(kernels, design, waiting, setup, hx):
    p = moved(setup)
    if not hx:
        p.given |= {"h_0": None, "c_0": None}
    rows = on_device(p.rows, META)
    there = Changed(kernels, lambda _: rows)
    with waiting:
        forward = call_forward(there, p)
        gradients = call_backward(there, p, forward)
    assert forward.output.device == gradients.input.device == META
    assert waiting.reports == 1  # of forward: once a call is enough


@pytest.mark.parametrize("change", [roomy, lambda rows: rows], ids=["roomy", "host"])
@pytest.mark.parametrize("setup", [SMALL, FIRST, PACKED], ids=str)
def test_nothing_waits_with_lengths_on_the_host(kernels, design, waiting, setup, change, monkeypatch):
    """One table a pass goes to the device, by the way that does not block."""
    p, uploads = moved(setup), []

    def upload(table: Tensor, device: torch.device) -> Tensor:
        uploads.append(table)
        return torch.empty(table.shape, dtype=table.dtype, device=device)

    monkeypatch.setattr(flat_rows, "upload", upload)
    with waiting:
        call_backward(Changed(kernels, change), p, call_forward(Changed(kernels, change), p))
    assert len(uploads) == 2
    assert waiting.reports == 0


WAITS = {
    "int": lambda t: int(t[0]),
    "bool": lambda t: bool(t[0] > 0),
    "item": lambda t: t[0].item(),
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "numpy": lambda t: t.numpy(),
    "nonzero": lambda t: t.nonzero(),
    "mask": lambda t: t[t > 0],
    "masked_select": lambda t: t.masked_select(t > 0),
    "equal": lambda t: torch.equal(t, t + 1),
    "repeat_interleave": lambda t: torch.repeat_interleave(t, t),
    "unique": lambda t: t.unique(),
    "from_the_host": lambda t: torch.arange(3).to(META),
    "into_it": lambda t: t.copy_(torch.arange(3)),
    "values": lambda t: torch.tensor([1, 2], device=META),
    "with_the_host": lambda t: t + torch.arange(3),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_would_show(waiting, name):
    lengths = torch.zeros(3, dtype=torch.int64, device=META)
    with waiting, pytest.raises((AssertionError, RuntimeError, TypeError)):
        WAITS[name](lengths)


def test_uploads_to_a_gpu_do_not_block(monkeypatch):
    """By way of page-locked memory."""
    done = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: done.append("pinned") or self)
    monkeypatch.setattr(Tensor, "to", lambda self, *args, **options: done.append((args, options)) or self)
    gpu = torch.device("cuda", 0)
    flat_rows.upload(torch.zeros(3), gpu)
    assert done == ["pinned", ((gpu,), {"non_blocking": True})]
