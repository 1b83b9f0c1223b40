"""What every example that trains refuses before it does anything."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.support.examples import refused

EXAMPLES = ("char_lm", "reinforcement", "streaming")


@pytest.fixture(params=EXAMPLES)
def main(request):
    return importlib.import_module(request.param).main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(main, tmp_path, capsys):
    told = refused(main, ["--device", "cuda", "--out", str(tmp_path)], capsys)
    assert "there is no cuda on this machine" in told
    assert "pass --device cpu" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--device", "gpu"), "expected cpu, cuda or cuda:N, got 'gpu'"),
        (("--iterations", "0"), "at least 1, got 0"),
        (("--learning-rate", "nan"), "a number above 0, got nan"),
        (("--clip", "-1"), "a number above 0, got -1"),
        (("--hidden-size", "many"), "invalid positive value: 'many'"),
    ],
)
def test_arguments_that_make_no_sense(main, arguments, told, capsys):
    assert told in refused(main, arguments, capsys)


def test_a_folder_that_cannot_be(main, tmp_path, capsys):
    """Known before the training, not after it."""
    (tmp_path / "file").write_text("")
    assert "file" in refused(main, ["--iterations", "1", "--out", str(tmp_path / "file" / "out")], capsys)
