"""``python -m lstmcore``: what it prints, its exit codes, its help."""

import subprocess
import sys

import pytest
import torch
from lstmcore.kernels import cell

import lstmcore
from lstmcore import cli
from lstmcore.cli import parity


def run_here(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, output, errors) of a command in this process, which has torch already."""
    try:
        status = cli.main(arguments)
    except SystemExit as end:  # argparse
        status = end.code
    return status, *capsys.readouterr()


def test_check(capsys):
    status, output, errors = run_here(capsys, "check")
    assert status == 0, output + errors
    assert "FAILED" not in output
    for text in ("packed", "bidirectional", "bfloat16", "outputs", "gradients", "ok"):
        assert text in output


def test_check_fails_where_something_is_wrong(monkeypatch, capsys):
    """A self-test that cannot fail says nothing: spoil the reference's cell."""
    monkeypatch.setattr(parity, "COMPARISONS", parity.COMPARISONS[:1])
    assert cli.main(["check", "--backend", "reference"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    monkeypatch.setattr(cell, "hidden_state", lambda o, tanh_c: o * tanh_c * 1.0001)
    assert cli.main(["check", "--backend", "reference"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--inference", "--dtype", "float64", "--stream"),
        ("--num-layers", "2", "--bidirectional", "--proj-size", "3", "--packed", "--no-bias", "--batch", "1"),
    ],
    ids=str,
)
def test_prewarm(options, capsys):
    status, output, errors = run_here(capsys, "prewarm", "--input-size", "3", "--hidden-size", "17", *options)
    assert status == 0, errors
    assert ("float64" if "float64" in options else "float32") in output
    assert "inference" in output
    assert ("training" in output) == ("--inference" not in options)
    assert ("stream" in output) == ("--stream" in options)


@pytest.mark.parametrize("name", ["", "info", "prewarm", "check", "tune"])
def test_help(name, capsys):
    status, output, errors = run_here(capsys, *filter(None, [name]), "--help")
    assert status == 0
    assert output.startswith(f"usage: python -m lstmcore {name}")
    assert not errors


def test_version(capsys):
    assert run_here(capsys, "--version")[:2] == (0, lstmcore.__version__ + "\n")


@pytest.mark.slow
def test_status_reaches_the_shell():
    command = [sys.executable, "-m", "lstmcore", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "nonsense" in done.stderr


BAD = [
    ("", "COMMAND"),
    ("nonsense", "nonsense"),
    ("info --nonsense", "--nonsense"),
    ("prewarm", "--input-size"),
    ("prewarm --input-size 0 --hidden-size 4", "0"),
    ("prewarm --input-size x --hidden-size 4", "x"),
    ("prewarm --input-size 3 --hidden-size 4 --dtype int8", "int8"),
    ("prewarm --input-size 3 --hidden-size 4 --proj-size 4", "proj"),
    ("prewarm --input-size 3 --hidden-size 4 --proj-size -1", "proj"),
    ("check --backend nonsense", "nonsense"),
    ("check --device nonsense", "nonsense"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD)
def test_bad_arguments(arguments, named, capsys):
    """Status 2, and one message that names the culprit instead of a traceback."""
    status, output, errors = run_here(capsys, *arguments.split())
    assert status == 2, output + errors
    assert named in errors
    assert "Traceback" not in errors


def test_check_of_a_backend_that_cannot_run_here(compiled_triton, capsys):
    """The check's tensors are on the CPU."""
    status, output, errors = run_here(capsys, "check", "--backend", "triton")
    assert status == 2, output + errors
    assert "triton" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("dtype", "device", "setting", "expected"),
    [
        (torch.float32, "cpu", "tf32", 8 * 2**-23),
        (torch.float32, "cuda", "ieee", 8 * 2**-23),
        (torch.float32, "cuda:0", "tf32", 2 * 2**-10),
        (torch.bfloat16, "cuda", "tf32", 2**-7),
        (torch.float16, "cpu", "tf32", 2**-10),
    ],
)
def test_what_the_check_grants(dtype, device, setting, expected, monkeypatch):
    """A few roundings; with TF32, which torch's setting for RNNs allows, those of its ten digits."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", setting)
    assert parity._floor(dtype, device) == expected
