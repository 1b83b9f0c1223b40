"""Outputs and every gradient against float64 ``torch.nn.LSTM``, over the named grid."""

import pytest
import torch

import lstmcore
from lstmcore.backends import aten

from ..support.cases import BY_NAME, CASES, DTYPES, draw, run
from ..support.oracle import RowByRow, assert_parity, judge
from ..support.tolerances import ORDER_OF_SUMS, ORDER_OF_SUMS_F32, assert_library, assert_same, bound, error

pytestmark = pytest.mark.xdist_group("parity")  # the oracle's results are remembered from one backend to the next


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype, backend):
    assert_parity(case, DTYPES[dtype], backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["h17", "everything", "packed_everything", "unbatched", "transposed", "saturated"])
def test_inference_against_float64(name, dtype, backend):
    """Without gradients a backend takes another path: same bound, for the same outputs."""
    case, dtype = BY_NAME[name], DTYPES[dtype]
    expected, peer_errors = judge(case, dtype)
    got = run(case, draw(case, dtype), dtype, backend, grad=False)
    assert got.keys() == {"output", "h_n", "c_n"}
    for key, value in got.items():
        assert error(value, expected[key]) <= bound(dtype, expected[key], peer_errors[key]), key


@pytest.mark.parametrize("name", ["h17", "packed_unsorted", "proj_bidirectional"])
def test_training_and_inference_agree(name, backend):
    case = BY_NAME[name]
    data = draw(case, torch.float32)
    trained, inferred = (run(case, data, torch.float32, backend, grad=grad) for grad in (True, False))
    for key, value in inferred.items():
        assert_same(value, trained[key], backend, key, torch.float32)


@pytest.mark.parametrize("name", [case.name for case in CASES if case.B * case.T < 50])
def test_torch_backend_is_torch(name, monkeypatch):
    """backend="torch" hands the whole of the work to ATen."""
    case = BY_NAME[name]
    data = draw(case, torch.float32)
    called, original = [], aten.run
    monkeypatch.setattr(aten, "run", lambda *given: called.append(1) or original(*given))
    ours, peers = (run(case, data, torch.float32, backend) for backend in ("torch", None))
    assert len(called) == 1
    assert ours.keys() == peers.keys()
    for key, value in peers.items():
        assert_library(ours[key], value, key, torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["h17", "h64", "packed_unsorted", "layers_bidirectional", "proj", "unbatched"])
def test_auto_against_float64(name, dtype):
    assert_parity(BY_NAME[name], DTYPES[dtype], "auto")


def test_row_by_row_oracle_agrees_with_torch():
    """The second oracle, which the contract's tests lean on, against the first."""
    T, B, H, P, lengths = 5, 4, 6, 3, torch.tensor([2, 5, 1, 4])
    lstm = torch.nn.LSTM(3, H, bidirectional=True, proj_size=P, dtype=torch.float64)
    x = torch.randn(T, B, 3, dtype=torch.float64)
    h_0, c_0 = torch.randn(2, B, P, dtype=torch.float64), torch.randn(2, B, H, dtype=torch.float64)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, (h_n, c_n) = lstm(packed, (h_0, c_0))
    output, _ = torch.nn.utils.rnn.pad_packed_sequence(output)
    weights = [
        {name.removesuffix(suffix): p for name, p in lstm.named_parameters() if name.endswith(suffix)}
        for suffix in ("_l0", "_l0_reverse")
    ]
    rows = RowByRow(x, h_0, c_0, weights, lengths)
    for got, expected in ((rows.output, output), (rows.h_n, h_n), (rows.c_n, c_n)):
        assert error(got, expected) < ORDER_OF_SUMS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_inputs_keep_a_float32_state(dtype, backend):
    """Without the recurrent weights nothing rounds h on the way: fifty steps of c_t are exact to float32."""
    module = lstmcore.LSTM(3, 17, bidirectional=True, dtype=DTYPES[dtype], backend=backend)
    oracle = torch.nn.LSTM(3, 17, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith("weight_hh"):
                p.zero_()
    oracle.load_state_dict(module.state_dict())
    x = torch.randn(50, 4, 3).to(DTYPES[dtype])
    _, _, cells = module(x, return_cells=True)
    for t in (0, 13, 49):
        assert error(cells[t, :, :17].double(), oracle(x[: t + 1].double())[1][1][0]) < ORDER_OF_SUMS_F32
        assert error(cells[t, :, 17:].double(), oracle(x[t:].double())[1][1][1]) < ORDER_OF_SUMS_F32
