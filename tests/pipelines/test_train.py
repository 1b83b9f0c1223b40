"""``examples/train.py``: stopped and gone on with to the bit, its options that change no result, files and errors."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ..support.torchrun import ROOT, ended, start, torchrun

train = pytest.importorskip("train", reason="examples/train.py needs the extra train")
FILE = ROOT / "examples" / "train.py"
# Functions of six files; of up to four chunks, of which the last is rarely whole.
QUICK = [*("--files", "6", "--batch", "4", "--steps", "64", "--longest", "256"), "--hidden-size", "24"]
ITERATIONS = 9


def run(folder: Path, *options: object) -> int:
    """The example in this process; its status."""
    return train.main([*QUICK, "--out", str(folder), *map(str, options)])


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt")


def same(got: Any, expected: Any, where: str = "") -> None:
    """All that a checkpoint has, to the bit."""
    if isinstance(got, dict):
        assert got.keys() == expected.keys(), where
        for name in got:
            same(got[name], expected[name], f"{where}[{name!r}]")
    elif isinstance(got, (list, tuple)):
        assert len(got) == len(expected), where
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            same(one, other, f"{where}[{index}]")
    else:
        assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected, where


def close(got: dict[str, Any], expected: dict[str, Any], tolerance: float = 2e-5) -> None:
    """Losses and parameters of two trainings whose sums are ordered differently, in float32."""
    torch.testing.assert_close(got["state"]["losses"], expected["state"]["losses"], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got["state"]["model"], expected["state"]["model"], rtol=0, atol=20 * tolerance)


def stop_at(step: int, signals: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal comes while that step, counted from 0, is computed."""
    whole, waiting = train.Trainer._backward, list(signals)

    def backward(trainer, *given):
        while len(trainer.losses) == step and waiting:
            signal.raise_signal(waiting.pop())
        return whole(trainer, *given)

    monkeypatch.setattr(train.Trainer, "_backward", backward)


STOPS = {"plain": ([], (2, 3, 4))} | {
    name: (options, (3,))
    for name, options in {
        "accumulate": ["--accumulate", 2, "--workers", 0],
        "bfloat16": ["--amp", "bfloat16", "--workers", 2],
        "float16": ["--amp", "float16", "--accumulate", 2],
    }.items()
}


@pytest.mark.serial
class TestStopped:
    @pytest.fixture(autouse=True)
    def _no_picture(self, monkeypatch):
        monkeypatch.setattr(train, "draw", lambda *_: None)

    @pytest.mark.parametrize(
        ("options", "stops"),
        [pytest.param(*each, id=name, marks=[pytest.mark.slow] * (name != "plain")) for name, each in STOPS.items()],
    )
    def test_goes_on_to_the_bit(self, options, stops, tmp_path, monkeypatch):
        """By SIGTERM and by Ctrl-C, in the middle of functions and between two batches."""
        assert run(tmp_path / "whole", "--iterations", ITERATIONS, *options) == 0
        whole, chunks = state(tmp_path / "whole"), set()
        for step in stops:
            folder = tmp_path / f"stopped-{step}"
            with monkeypatch.context() as patch:
                stop_at(step, [signal.SIGINT if step == 2 else signal.SIGTERM], patch)
                assert run(folder, "--iterations", ITERATIONS, *options) == 130
            stopped = state(folder)["state"]
            assert stopped["losses"] == whole["state"]["losses"][: step + 1]
            chunks.add(stopped["position"]["chunk"])
            assert run(folder, "--resume", "--iterations", ITERATIONS, *options) == 0
            same(state(folder), whole)
        assert len(chunks) >= min(2, len(stops)), "each time it was stopped at the same place of a function"

    def test_the_second_signal_acts_as_always(self, tmp_path, monkeypatch):
        stop_at(3, [signal.SIGINT, signal.SIGINT], monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "--iterations", ITERATIONS)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def test_no_worker_is_left(self, tmp_path, monkeypatch):
        stop_at(1, [signal.SIGTERM], monkeypatch)
        run(tmp_path, "--iterations", ITERATIONS, "--workers", 2)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
        if not children.exists():
            pytest.skip("this system does not list the children of a process")
        deadline = time.monotonic() + 20
        while names := [n for n in children.read_text().split() if b"resource_tracker" not in command_of(n)]:
            assert time.monotonic() < deadline, f"still there: {names}"
            time.sleep(0.1)


def command_of(process: str) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


@pytest.mark.serial
@pytest.mark.slow
def test_two_processes_of_torchrun(tmp_path, capsys):
    """Stopped by SIGTERM it goes on, and has trained as if it was not, to the bit; and as one process, to rounding.

    The checkpoint is of two processes, and refused by one.
    """
    program = (FILE, *QUICK, "--dropout", 0)
    running = start(2, *program, "--out", tmp_path, "--iterations", 10**6, "--save-every", 2)
    deadline = time.monotonic() + 150
    while not (tmp_path / "checkpoint.pt").exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    output = ended(running)
    assert "stopped after step" in output, output
    steps = len(state(tmp_path)["state"]["losses"]) + 3
    torchrun(2, *program, "--out", tmp_path, "--iterations", steps, "--resume")
    torchrun(2, *program, "--out", tmp_path / "whole", "--iterations", steps)
    same(state(tmp_path), state(tmp_path / "whole"))

    assert run(tmp_path / "one", "--dropout", 0, "--iterations", steps) == 0
    close(state(tmp_path), state(tmp_path / "one"))

    assert run(tmp_path, "--dropout", 0, "--iterations", steps, "--resume") == 2
    error = capsys.readouterr().err
    assert "world_size 2 (now 1)" in error
    assert "parallel ddp (now None)" in error


@pytest.mark.serial
@pytest.mark.slow
def test_fsdp2_of_torchrun(tmp_path):
    """Parameters shared out, accumulation: the training of one process."""
    options = ("--dropout", 0, "--iterations", 6)
    torchrun(2, FILE, *QUICK, *options, "--parallel", "fsdp2", "--accumulate", 2, "--out", tmp_path / "two")
    assert run(tmp_path / "one", *options) == 0
    close(state(tmp_path / "two"), state(tmp_path / "one"))


@pytest.mark.slow
def test_options_that_change_no_result(tmp_path):
    """A batch in parts is the batch, and compiled it is, to rounding; the number of workers changes nothing at all."""
    options = ("--dropout", 0, "--iterations", ITERATIONS)
    assert run(tmp_path / "plain", *options) == 0
    plain = state(tmp_path / "plain")
    for parts in (2, 4):
        assert run(tmp_path / "parts", *options, "--accumulate", parts) == 0
        close(state(tmp_path / "parts"), plain)
    assert run(tmp_path / "workers", *options, "--workers", 2) == 0
    same(state(tmp_path / "workers"), plain)
    assert run(tmp_path / "compiled", *options, "--compile") == 0
    close(state(tmp_path / "compiled"), plain)


@pytest.mark.serial
def test_tensorboard(tmp_path, monkeypatch):
    """The event files, read back: every step's loss once, though it was stopped; and the gradient flow now and then."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed: extra train"
    )
    options = ("--iterations", ITERATIONS, "--tensorboard", tmp_path / "events", "--flow-every", 3, "--accumulate", 2)
    with monkeypatch.context() as patch:
        stop_at(3, [signal.SIGTERM], patch)
        assert run(tmp_path, *options) == 130
    assert run(tmp_path, *options, "--resume") == 0
    events = reader.EventAccumulator(str(tmp_path / "events")).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert list(losses) == list(range(ITERATIONS))
    assert list(losses.values()) == pytest.approx(state(tmp_path)["state"]["losses"], rel=1e-6)  # float32
    flow = {tag for tag in events.Tags()["scalars"] if tag.startswith("gradient_flow/lstm/layer_0/")}
    assert {f"gradient_flow/lstm/layer_0/{name}" for name in ("h/ratio", "c/ratio", "horizon/median")} <= flow
    ratios = events.Scalars("gradient_flow/lstm/layer_0/c/ratio")
    assert [event.step for event in ratios] == [0, 3, 4, 7]  # every third step after it began, and began again
    assert all(0 < event.value < float("inf") for event in ratios)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--resume"], "there is no checkpoint at"),
        (["--batch", "5", "--accumulate", "2"], "pass a multiple of 2"),
        (["--parallel", "ddp"], "torchrun --nproc-per-node 2"),
        (["--batch", "100000"], "lower --batch"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_what_cannot_run(options, said, tmp_path, capsys):
    assert run(tmp_path, *options) == 2
    assert said in capsys.readouterr().err


def test_a_checkpoint_of_another_training(tmp_path, capsys):
    """Sizes, data, seed: what differs is named, with both values."""
    assert run(tmp_path, "--iterations", 1, "--seed", 1) == 0
    assert run(tmp_path, "--iterations", 2, "--resume", "--hidden-size", 25, "--amp", "bfloat16") == 2
    error = capsys.readouterr().err
    for told in ("seed 1 (now 0)", "hidden_size 24 (now 25)", "amp None (now bfloat16)"):
        assert told in error


def test_a_package_that_is_missing(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard" or "utils.tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # importing it raises ModuleNotFoundError
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--iterations", 2, "--tensorboard", tmp_path / "events")
    assert end.value.code == 2
    assert "pip install -e '.[train]'" in capsys.readouterr().err
