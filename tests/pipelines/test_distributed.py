"""Two processes of torchrun compute what one process does with torch.nn.LSTM over the whole batch, in float64.

DDP and FSDP2, for dense, ragged and packed input and for chunks of it.  What one process can show, with several
buckets, with parameters built on the meta device and so on, is in ``tests/torch/test_ecosystem.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lstmcore

from ..support.modules import close
from ..support.tolerances import NORMS, error
from ..support.torchrun import torchrun
from .two_processes import CALLS, CLIP, WRAPPERS, B, Model, losses

PROGRAM = Path(__file__).with_name("two_processes.py")
Found = dict[tuple[str, str], dict[str, Any]]
each_way = pytest.mark.parametrize(("kind", "call"), [(kind, call) for kind in WRAPPERS for call in CALLS])
slow_and_serial = [pytest.mark.slow, pytest.mark.serial]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What two processes on the CPU found, all of it, from one start."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    return run(2, "cpu", tmp_path_factory.mktemp("gloo") / "found.pt")


def run(processes: int, device: str, path: Path) -> Found:
    torchrun(processes, PROGRAM, device, path)
    return torch.load(path)


def alone(call: str, start: dict[str, Tensor]) -> dict[str, Any]:
    """The same training by one process, all rows in one batch, with torch.nn.LSTM."""
    model = Model(nn.LSTM)
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(4):
        total = torch.zeros((), dtype=torch.float64)
        for loss in losses(model, "packed" if call == "lengths" else call, slice(0, B)):
            loss.backward()
            total += loss.detach()
        found["losses"].append(total)
        if step == 0:
            found["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters()}
        else:
            found["norms"].append(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
            optimizer.step()
        optimizer.zero_grad()
    return found | {"state": model.state_dict()}


def compare(found: dict[str, Any], expected: dict[str, Any], tolerance: float | None = None) -> None:
    for name in ("gradients", "state"):
        assert found[name].keys() == expected[name].keys()
        for key, value in expected[name].items():
            close(found[name][key].double(), value, tolerance)
    assert min(expected["norms"]) > CLIP, "nothing was clipped"
    for name in ("losses", "norms"):
        for got, value in zip(found[name], expected[name], strict=True):
            close(got.double(), value, tolerance)


class TestGloo:
    pytestmark = slow_and_serial

    @each_way
    def test_gradients_and_training(self, kind, call, shared):
        """Of the whole batch: the gradients, then losses, norms and parameters of steps with clipped gradients."""
        found = shared[kind, call]
        compare(found, alone(call, found["start"]))

    @pytest.mark.parametrize("kind", WRAPPERS)
    def test_state_dict_round_trip(self, kind, shared):
        """Of any wrapper, torch.nn.LSTM loads it; and back in, every parameter is what it was, to the bit."""
        found = shared[kind, "dense"]
        Model(nn.LSTM).load_state_dict(found["state"])
        for name, value in found["start"].items():
            assert torch.equal(found["restored"][name], value), name

    @each_way
    def test_gradient_flow(self, kind, call, shared):
        """A recording of the model inside the wrapper has the norms of this process's rows."""
        found = shared[kind, call]
        model = Model(lstmcore.LSTM, backend="numba")
        model.load_state_dict(found["start"])
        with lstmcore.record_gradient_flow(model) as flow:
            for loss in losses(model, call, slice(0, B // 2)):
                loss.backward()
        expected = [record.c.mean for record in flow.records]
        assert len(found["recorded"]) == len(expected) == 2 * (3 if call == "chunks" else 1)
        for got, value in zip(found["recorded"], expected, strict=True):
            assert error(got, value) <= NORMS[torch.float64] * value.max().item()


@pytest.mark.gpu
@pytest.mark.slow
def test_nccl(tmp_path):
    """A process for each CUDA device, as many as divide the batch: NCCL, in float32 by the Triton kernels."""
    processes = max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    found = run(processes, "cuda", tmp_path / "found.pt")
    for (_, call), each in found.items():
        start = {name: value.cpu() for name, value in each["start"].items()}
        compare(each, alone(call, start), 1e-4)  # float32 over four steps, with TF32 nowhere
