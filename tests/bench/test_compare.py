"""``python -m bench compare``: two commits in processes of their own, and what counts as worse."""

from __future__ import annotations

import contextlib
import pathlib
import shutil

import pytest

from bench import cli, compare
from bench.cases import CASES
from bench.compare import Figures
from bench.verify import Mismatch

ROOT = pathlib.Path(__file__).parents[2]
CALL = CASES["call-h16-b1-t1"]
PACKED = next(case for case in CASES.values() if case.group == "packed" and "compare" in case.tags)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0, 1.01], [1.02], ""),  # steady, but not worth a word
        ([1.0, 1.01], [1.04], "worse"),
        ([1.04, 1.05], [1.0], "better"),
        ([1.0, 1.2, 1.1, 1.1], [1.3, 1.31], ""),  # A differs as much from itself
        ([1.0, 1.2, 1.1, 1.1], [1.4, 1.3, 1.4], "worse"),
        ([1.0, 2.0], [1.0, 2.0], ""),
    ],
)
def test_verdict(a, b, verdict):
    assert Figures("ms", a, b).verdict == verdict


def test_memory_is_steadier_than_time_and_small_differences_are_no_news():
    assert Figures("MiB", [20.0, 20.1], [20.8]).verdict == ""
    assert Figures("MiB", [20.0, 20.1], [21.5]).verdict == "worse"


def test_what_is_compared():
    groups = {case.group for case in CASES.values() if "compare" in case.tags}
    assert groups == {"call", "short", "dense", "packed"}
    assert any("memory" in case.tags for case in CASES.values() if "compare" in case.tags)


def test_answers(short_samples, monkeypatch):
    assert compare.answer(CALL.name) == 0.0
    assert compare.answer(CALL.name, "training") > 0
    for setting in compare.SETTINGS:
        assert compare.answer(CALL.name, "inference", setting, calls=2) > 0
    monkeypatch.setattr(compare, "checked", lambda case, modes: (_ for _ in ()).throw(Mismatch("wrong")))
    with pytest.raises(Mismatch):  # no figure for a wrong result
        compare.answer(CALL.name)


@contextlib.contextmanager
def pretended(site):
    """A process whose calls take as long as its place says, and twice that behind an operation of torch's."""
    seconds = float(site.name)
    yield lambda **question: seconds * (2 if question.get("setting") == "after torch" else 1)


def test_times(monkeypatch):
    monkeypatch.setattr(compare, "started", pretended)
    sites = [pathlib.Path(seconds) for seconds in ("0.5", "0.25", "1.0")]
    found = dict(compare.times([CALL, PACKED], sites, samples=3))
    assert found.keys() == {
        (case.name, mode, setting) for case in (CALL, PACKED) for mode in case.modes for setting in compare.SETTINGS
    }
    assert found[CALL.name, "training", "alone"] == [500.0, 250.0, 1000.0]
    assert found[CALL.name, "training", "after torch"] == [1000.0, 500.0, 2000.0]


@pytest.mark.parametrize("slower", [False, True])
def test_a_run(monkeypatch, capsys, slower):
    sites = {"one": pathlib.Path("0.5"), "two": pathlib.Path("0.6" if slower else "0.505")}
    monkeypatch.setattr(compare, "started", pretended)
    monkeypatch.setattr(compare, "installed", lambda name: (name, sites[name]))
    memory = iter([10.0, 10.1, 10.0, 10.0, 10.1, 30.0] if slower else [10.0] * 6)
    monkeypatch.setattr(compare, "peak_memory_mib", lambda case, provider, **where: next(memory))
    monkeypatch.setitem(CASES, PACKED.name, PACKED)
    arguments = ["compare", "one", "two", "--case", "packed-h128-b32-*", "--rounds", "2"]
    assert cli.main(arguments) == int(slower)
    shown = capsys.readouterr().out
    assert "one (A) and two (B)" in shown
    assert "peak memory" in shown
    assert f"{5 if slower else 0} of 5 figures of two are worse than those of one" in shown


def test_what_cannot_be_compared(capsys):
    assert cli.main(["compare", "HEAD", "HEAD", "--case", "nothing"]) == 2
    assert "no case matches --case nothing" in capsys.readouterr().err
    if shutil.which("git") and (ROOT / ".git").exists():
        assert cli.main(["compare", "no-such-commit", "HEAD"]) == 2
        assert "no-such-commit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["compare", "HEAD"])


@pytest.mark.slow
def test_a_process_imports_the_package_from_its_place(tmp_path):
    site = tmp_path / "site"
    clean = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lstmcore", site / "lstmcore", ignore=clean)
    shutil.copytree(ROOT / "kernels", site / "lstmcore" / "kernels", ignore=clean)
    (site / "lstmcore" / "_version.py").write_text('__version__ = "elsewhere"\nimport sys\nsys.stderr.write("here")\n')
    with compare.started(site) as ask:
        assert ask(case=CALL.name) == 0.0
        assert ask(case=CALL.name, mode="inference", setting="alone", calls=1) > 0
    empty = tmp_path / "empty"
    empty.mkdir()
    with compare.started(empty) as ask, pytest.raises(RuntimeError, match="ended with status 1"):
        ask(case=CALL.name)
