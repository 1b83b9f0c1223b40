"""What the examples share: checkpoints that are whole, and refused where they do not fit; devices; errors in words."""

from __future__ import annotations

import argparse
import re

import pytest
import torch

import common
from common import CannotRun, Checkpoint

SETTINGS = {"example": "one", "seed": 3, "text": None}


def test_what_comes_back(tmp_path):
    """Everything, and the generator goes on from where it was."""
    checkpoint = Checkpoint(tmp_path / "folder" / "one.pt", SETTINGS)
    state = {"weights": torch.randn(3), "losses": [1.5, 2.5], "nested": {"step": 7, "hx": (torch.ones(2), None)}}
    checkpoint.save(state)
    expected = torch.rand(4)
    torch.manual_seed(99)
    loaded = checkpoint.load()
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(loaded["weights"], state["weights"])
    assert loaded["losses"] == state["losses"]
    assert loaded["nested"]["step"] == 7
    assert loaded["nested"]["hx"][1] is None
    assert [path.name for path in checkpoint.path.parent.iterdir()] == ["one.pt"], "nothing else is left behind"


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "one.pt", SETTINGS)
    checkpoint.save({"step": 1})

    def broken(content, path):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"step": 2})
    assert checkpoint.load() == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["one.pt"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 4}, "seed 3 (now 4)"),
        ({"example": "two"}, "example one (now two)"),
        ({"text": "a"}, "text None (now a)"),
        ({"new": 1}, "new None (now 1)"),
    ],
)
def test_other_settings(changed, told, tmp_path):
    Checkpoint(tmp_path / "one.pt", SETTINGS).save({})
    before = torch.get_rng_state()
    with pytest.raises(CannotRun, match=re.escape(told)) as error:
        Checkpoint(tmp_path / "one.pt", SETTINGS | changed).load()
    assert str(error.value).count("(now") == 1, "what is the same is not told"
    assert torch.equal(torch.get_rng_state(), before), "a refused checkpoint changes nothing"


def test_a_setting_that_is_gone(tmp_path):
    Checkpoint(tmp_path / "one.pt", SETTINGS).save({})
    with pytest.raises(CannotRun, match=r"seed 3 \(now None\)"):
        Checkpoint(tmp_path / "one.pt", {"example": "one", "text": None}).load()


@pytest.mark.parametrize(
    "damage",
    [lambda good: b"", lambda good: b"hello world", lambda good: good[: len(good) // 2], lambda good: bytes(1000)],
    ids=["empty", "text", "half", "zeros"],
)
def test_a_damaged_file(damage, tmp_path):
    checkpoint = Checkpoint(tmp_path / "one.pt", SETTINGS)
    checkpoint.save({"step": torch.ones(5)})
    checkpoint.path.write_bytes(damage(checkpoint.path.read_bytes()))
    with pytest.raises(CannotRun, match=r"one\.pt is damaged.*delete it and run without --resume"):
        checkpoint.load()


@pytest.mark.parametrize("content", [[1], {"settings": {}}, torch.ones(3)], ids=["list", "half of it", "tensor"])
def test_something_else(content, tmp_path):
    torch.save(content, tmp_path / "one.pt")
    with pytest.raises(CannotRun, match="something else"):
        Checkpoint(tmp_path / "one.pt", SETTINGS).load()


def test_no_file(tmp_path):
    with pytest.raises(CannotRun, match=r"no checkpoint at .*one\.pt; run without --resume first"):
        Checkpoint(tmp_path / "one.pt", SETTINGS).load()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Checkpoint(tmp_path / "file" / "one.pt", SETTINGS)
    monkeypatch.setattr(common.os, "access", lambda path, mode: False)  # for root, every folder can
    with pytest.raises(PermissionError, match="cannot write into this folder"):
        Checkpoint(tmp_path / "one.pt", SETTINGS)


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:x", "meta", "mps"])
def test_what_is_no_device(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected cpu, cuda or cuda:N, got '{text}'"):
        common.device(text)


def test_devices_that_are_not_there(monkeypatch):
    assert common.device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for text in ("cuda", "cuda:0"):
        with pytest.raises(argparse.ArgumentTypeError, match=rf"no {text} on this machine.*pass --device cpu"):
            common.device(text)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert common.device("cuda") == torch.device("cuda")
    assert common.device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(argparse.ArgumentTypeError, match=r"no cuda:2 on this machine.*pass --device cuda:1"):
        common.device("cuda:2")


@pytest.mark.parametrize("error", [CannotRun("no such thing; do that"), OSError(28, "No space left", "file")])
def test_reasons_are_told(error, capsys):
    @common.reported
    def main(arguments):
        assert arguments == ["--seed"]
        raise error

    assert main(["--seed"]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_mistakes_are_not_hidden():
    @common.reported
    def main(arguments):
        raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="a mistake of ours"):
        main()


def test_a_package_that_is_missing(capsys):
    with pytest.raises(SystemExit) as end, common.brought_by("examples"):
        import not_installed_anywhere  # noqa: F401
    assert end.value.code == 2
    assert "needs not_installed_anywhere; pip install -e '.[examples]'" in capsys.readouterr().err
