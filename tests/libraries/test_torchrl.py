"""torchrl's LSTMModule on rollouts in which trajectories begin."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torchrl", reason="torchrl is not installed here: make test-libraries")

from torchrl.modules import LSTMModule, set_recurrent_mode

import lstmcore
from bench.libraries import pages, parity, torchrl
from bench.libraries.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pipeline", torchrl.PIPELINES, ids=lambda pipeline: pipeline.name)
def test_it_trains_as_before(pipeline: Pipeline):
    parity.check(pipeline)


def test_the_page_moves_it_over():
    assert pages.run("torchrl")["report"].moved == ["lstm"]


def test_it_asks_for_an_instance_of_torchs_class():
    """Why the page says ``subclass=True``."""
    memory, given = LSTMModule(6, 8, in_key="observation", out_key="features"), torchrl.rollout(torchrl.SMALL, 12)
    lstmcore.patch(memory)
    with set_recurrent_mode(True), pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        memory(given.clone())
    lstmcore.unpatch(memory)
    lstmcore.patch(memory, subclass=True)
    with set_recurrent_mode(True):
        memory(given.clone())


def test_it_may_be_imported_when_ours_is_installed():
    """It copies the attributes of torch's class, or then ours, to a class of its own."""
    program = """
import torch, lstmcore
lstmcore.install(subclass=True)
from bench.libraries import torchrl
from torchrl.modules import LSTMModule, set_recurrent_mode
given = torchrl.rollout(torchrl.SMALL, 12)
torch.manual_seed(0)
ours = LSTMModule(6, 8, in_key="observation", out_key="features")
torch.manual_seed(0)
python = LSTMModule(6, 8, in_key="observation", out_key="features", python_based=True)
assert isinstance(ours.lstm, lstmcore.LSTM) and isinstance(ours.lstm, torch.nn.LSTM)
with set_recurrent_mode(True):
    got, expected = (memory(given.clone())["features"] for memory in (ours, python))
torch.testing.assert_close(got, expected)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
