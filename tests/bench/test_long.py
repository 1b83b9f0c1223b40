"""``python -m bench long``: who has the memory is timed, who has not is told of; nothing unchecked gets a figure."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from bench import cli, memory, rows, session, tables
from bench.cases import CASES, MODES, Case, select
from bench.experiments import long
from bench.measure import Task
from bench.memory import OutOfMemory
from bench.providers import OURS, PEER
from bench.timing import Effort
from bench.verify import Mismatch

TINY = Case("tiny", "long", 5, 8, 3, 40)
TASK = Task(Effort(2, 0.0), "reference")
pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.fixture
def peaks(monkeypatch):
    """What the processes that ask for the memory say, by provider and mode; 10 MiB where nothing else is set."""
    answers, asked = {}, []

    def peak(case, provider, backend, *, mode, options):
        asked.append((provider, mode))
        answer = answers.get((provider, mode), 10.0)
        if isinstance(answer, str):
            raise OutOfMemory(answer)
        return answer

    monkeypatch.setattr(long, "peak_memory_mib", peak)
    monkeypatch.setattr(long, "peak_gflops", lambda dtype, threads: 100.0)
    monkeypatch.setattr(long, "SHORTEST_SEGMENT", 8)
    answers["asked"] = asked
    return answers


def measured(case=TINY, task=TASK):
    return {(row.mode, row.variant): row for row in long.measure(case, task)}


def test_rows(peaks):
    peaks[PEER, "training"] = 20.0
    found = measured()
    assert set(found) == {("training", ""), ("training", "recompute"), ("inference", "")}
    for (mode, _), row in found.items():
        assert (row.experiment, row.backend, row.peer, row.pairs) == ("long", "reference", "torch", 2)
        assert row.pair_ratio > 0
        assert float(row.details["step_us"]) == pytest.approx(row.p50_ms * 1e3 / 40, rel=1e-5)
        assert float(row.details["peer_step_us"]) == pytest.approx(row.peer_p50_ms * 1e3 / 40, rel=1e-5)
        assert set(row.details) <= set(long.LONG.details)
        assert row.details.get("segment") == ("8" if row.variant else None)
        assert row.reference == "float64"
        assert (row.memory_mib, row.peer_memory_mib) == ((10.0, 20.0) if mode == "training" else (None, None))
    # Who gets through training is not asked again.
    assert peaks["asked"] == [(OURS, "training"), (OURS, "training"), (PEER, "training")]


def test_a_peer_without_the_memory_is_told_of(peaks):
    peaks[PEER, "training"] = "more than 19.2 GiB"
    found = measured()
    assert set(found) == {("training", ""), ("training", "recompute"), ("inference", "")}
    for variant in ("", "recompute"):
        row = found["training", variant]
        assert (row.peer, row.peer_p50_ms, row.peer_memory_mib, row.pair_ratio) == ("torch", None, None, None)
        assert row.details["peer_fails"] == "out of memory, more than 19.2 GiB"
        assert "peer fails: out of memory, more than 19.2 GiB" in tables.line(row)
    assert found["inference", ""].peer_p50_ms > 0  # that was tried by itself, and ours not again
    assert [mode for provider, mode in peaks["asked"] if provider == OURS] == ["training", "training"]
    assert "peer_fails" not in found["inference", ""].details


def test_ours_without_the_memory_leaves_the_others(peaks, monkeypatch):
    def peak(case, provider, backend, *, mode, options):
        if provider == OURS and "recompute" not in options:
            raise OutOfMemory("ended by SIGKILL")
        return 5.0

    monkeypatch.setattr(long, "peak_memory_mib", peak)
    found = measured(task=replace(TASK, mode="training"))
    assert set(found) == {("training", "recompute")}
    row = found["training", "recompute"]
    assert row.details["plain_fails"] == "out of memory, ended by SIGKILL"
    assert row.peer_p50_ms > 0


def test_nobody_has_the_memory(peaks, registry, capsys):
    for mode in MODES:
        peaks[OURS, mode] = peaks[PEER, mode] = "more than 1 GiB"
    registry(TINY)
    assert cli.main(["long", "--no-save"]) == 0
    assert "not measured: tiny: ours takes more memory than there is" in " ".join(capsys.readouterr().out.split())


def test_long_cases_are_checked_on_fewer_steps(peaks, monkeypatch):
    monkeypatch.setattr(long, "CHECKED_STEPS", 16)
    assert {row.reference for row in measured().values()} == {"float64, 16 steps"}


def test_the_largest_are_timed_once(peaks, monkeypatch):
    monkeypatch.setattr(long, "ONCE_GFLOP", 0)
    assert {row.pairs for row in measured().values()} == {1}


def test_no_figure_for_a_wrong_result(peaks, monkeypatch):
    monkeypatch.setattr(long, "check", lambda problem, ours, peer, modes: (_ for _ in ()).throw(Mismatch("wrong")))
    with pytest.raises(Mismatch, match="wrong"):
        measured()


def test_a_run(peaks, registry, tmp_path, capsys):
    peaks[PEER, "training"] = "more than 19.2 GiB"
    registry(TINY)
    command = ["long", "--case", "tiny", "--pairs", "2", "--seconds", "0", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "out of memory" in told
    (path,) = tmp_path.glob("*.csv")
    saved = rows.read(path)
    assert [(row.case, row.mode) for row in saved] == [("tiny", mode) for mode in ("training", "training", "inference")]
    assert saved[0].details["peer_fails"] == "out of memory, more than 19.2 GiB"
    tables.show_long(session.screen(), saved)
    assert "10 MiB" in capsys.readouterr().out


def test_the_cases():
    cases = select("long")
    assert {case.steps for case in cases if case.batch == 1} >= {1024, 1_000_000}
    assert {case.steps for case in cases if case.batch == 16} >= {1024, 131_072}
    assert 0 < len(select("long", quick=True)) < 4
    assert not {case.group for case in select("speed")} & {"long"}


@pytest.mark.parametrize(
    ("status", "answer", "error", "text"),
    [
        (0, {"allowed_gib": 19.23}, OutOfMemory, r"^more than 19\.2 GiB$"),
        (-signal.SIGKILL, None, OutOfMemory, "^ended by SIGKILL$"),
        (-signal.SIGABRT, None, OutOfMemory, "^ended by SIGABRT$"),
        (-signal.SIGSEGV, None, subprocess.CalledProcessError, "SIGSEGV"),  # not for want of memory
        (1, None, subprocess.CalledProcessError, "status 1"),
    ],
)
def test_how_a_process_ends(monkeypatch, status, answer, error, text):
    stdout = "" if answer is None else json.dumps(answer)
    monkeypatch.setattr(
        memory.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, status, stdout=stdout)
    )
    with pytest.raises(error, match=text):
        memory.peak_memory_mib(TINY, OURS)


@pytest.mark.slow
def test_a_process_stops_where_it_has_not_the_memory():
    """A limit of about a hundredth of the step's size; a step that fits, in another process, does."""
    case = max((each for each in select("long") if each.steps == 4096), key=lambda each: each.batch)
    program = (
        f"import lstmcore.recompute; lstmcore.recompute.available = lambda device: {64 << 20}\n"
        "from bench import memory\n"
        f"print(memory._answer({case.name!r}, 'torch', backend='auto', mode='training', options={{}}))".replace(
            "'torch'", "provider='torch'"
        )
    )
    root = memory.Path(memory.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{'allowed_gib': 0.05"), done.stdout
    small = CASES["call-h16-b1-t1"]
    assert 0 <= memory.peak_memory_mib(small, PEER, mode="inference") < 64


def test_an_error_that_is_no_want_of_memory_is_none(monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("a shape does not fit")

    monkeypatch.setattr(memory, "_measure", wrong)
    monkeypatch.setattr(memory, "_limit", lambda: 1.0)
    with pytest.raises(RuntimeError, match="a shape"):
        memory._answer("call-h16-b1-t1")
    monkeypatch.setattr(memory, "_measure", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    assert memory._answer("call-h16-b1-t1") == {"allowed_gib": 1.0}
