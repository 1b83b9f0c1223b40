"""onnxruntime as a peer of the benchmark, and runs with one thread.

Rows here are made up and live in temporary folders; none of them is a result.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import cli, machine, measure, memory, onnx_peer, report, rows, session, summary, tables, timing
from bench.cases import Case, select
from bench.experiments import AFTER_TORCH, SPEED
from bench.measure import Task
from bench.providers import OURS, Problem, draw
from bench.rows import Row
from bench.timing import Effort
from bench.verify import Mismatch

TINY = Case("tiny", "dense", 5, 8, 3, 6)
PACKED = replace(TINY, name="packed", group="packed", mean_length=0.5)
TASK = Task(Effort(min_pairs=2, budget_s=0.0), "reference")


@pytest.fixture
def installed() -> None:
    for name in ("onnx", "onnxruntime"):
        pytest.importorskip(name)


@pytest.fixture
def own_threads():
    """Restores the number of torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the model ---------------------------------------------------------------------------------------------------


def problem_of(module: nn.LSTM, case: Case) -> Problem:
    """The data of the case, with the module's own weights."""
    return replace(draw(case), weights=module.state_dict())


def expected(module: nn.LSTM, problem: Problem) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        output, (h_n, c_n) = module(problem.input, problem.hx)
    return output, h_n, c_n


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_parity(installed, layers, bidirectional, batch, bias):
    case = replace(TINY, batch=batch, num_layers=layers, bidirectional=bidirectional)
    module = nn.LSTM(case.input_size, case.hidden_size, layers, bias=bias, bidirectional=bidirectional)
    problem = problem_of(module, case)
    session = onnx_peer.Session(module, problem)
    torch.testing.assert_close(session.outputs(), expected(module, problem), rtol=1e-5, atol=1e-6)
    assert len(onnx_peer.seconds(module, problem, expected(module, problem), min_samples=2, budget_s=0.0)) == 2


def test_no_figure_for_a_wrong_result(installed):
    module = nn.LSTM(TINY.input_size, TINY.hidden_size)
    problem = problem_of(module, TINY)
    output, h_n, c_n = expected(module, problem)
    with pytest.raises(Mismatch, match="tiny, onnxruntime, c_n: expected an error of at most"):
        onnx_peer.seconds(module, problem, (output, h_n, c_n + 1e-3), min_samples=2, budget_s=0.0)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="only Linux tells the threads of a process")
def test_no_thread_is_left(installed, monkeypatch):
    """They would spin while the others are timed."""

    def count() -> int:
        return len(os.listdir("/proc/self/task"))

    module = nn.LSTM(TINY.input_size, TINY.hidden_size)
    problem = problem_of(module, TINY)
    outputs = expected(module, problem)
    counted: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(onnx_peer, "repeat", lambda *_, **__: counted.append(count()))
    before = count()
    onnx_peer.seconds(module, problem, outputs, min_samples=2, budget_s=0.0)
    assert counted == [before + 3]
    assert count() == before


def test_what_is_covered():
    covered = {case.group for case in select() if onnx_peer.covers(case, "inference")}
    assert covered == {"dense", "dense-i1", "steps", "bidirectional", "layers4", "last", "short", "call"}
    assert not any(onnx_peer.covers(case, "training") for case in select())
    assert not onnx_peer.covers(replace(TINY, device="cuda"), "inference")


def test_a_block_of_calls(monkeypatch):
    """Nobody else runs in it; each sample follows a pause."""
    clock, seen = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        seen.append("call")
        clock[0] += 0.06

    pauses = timing.Clock(lambda: seen.append("pause"), lambda: None)
    samples = timing.repeat(call, min_samples=3, budget_s=0.0, clock=pauses)
    assert seen == ["call", *["pause", "call"] * 3]
    assert samples == pytest.approx((0.06,) * 3)


# --- a run -------------------------------------------------------------------------------------------------------


def run_tiny(registry, monkeypatch, path: pathlib.Path, *cases: Case) -> int:
    monkeypatch.setattr(session, "peak_gflops", lambda dtype, threads: 1.0)
    monkeypatch.setattr(measure, "peak_gflops", lambda dtype, threads: 1.0)
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-3)
    registry(*cases)
    return session.Session([(AFTER_TORCH, TASK), (SPEED, TASK)], path).run(cases)


@pytest.mark.slow
def test_run(installed, registry, monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert run_tiny(registry, monkeypatch, path, TINY, PACKED) == 0
    output = capsys.readouterr().out
    assert "skipped" not in output
    assert "vs onnxruntime" in output
    found = {(row.experiment, row.case, row.mode, row.peer): row for row in rows.read(path)}
    assert len(found) == 2 * 2 * 2 + 1
    alone, beside = (found["speed", "tiny", "inference", peer] for peer in ("torch", "onnxruntime"))
    assert beside.onnxruntime == machine.versions()["onnxruntime"] != ""
    assert beside.p50_ms == alone.p50_ms
    assert beside.peer_backend == "onnxruntime"
    assert alone.max_error == found["after-torch", "tiny", "inference", "torch"].max_error
    (tiny,) = (each for each in summary.entries(list(found.values())) if each.onnxruntime)
    assert (tiny.main.experiment, tiny.alone, tiny.onnxruntime) == ("after-torch", alone, beside)


@pytest.mark.slow
@pytest.mark.parametrize("absent", ["onnx", "onnxruntime"])
def test_run_where_it_is_not_installed(registry, monkeypatch, tmp_path, capsys, absent):
    monkeypatch.setitem(sys.modules, absent, None)  # which makes an import of it fail
    path = tmp_path / "rows.csv"
    assert run_tiny(registry, monkeypatch, path, TINY, replace(TINY, name="tiny too")) == 0
    output = capsys.readouterr().out
    said = [line for line in output.splitlines() if "onnxruntime is skipped" in line]
    assert len(said) == 1
    assert absent in said[0]
    assert "(pip install onnxruntime onnx)" in said[0]
    assert "vs onnxruntime" not in output
    assert {row.peer for row in rows.read(path)} == {"torch"}
    assert run_tiny(registry, monkeypatch, path, PACKED) == 0
    assert "skipped" not in capsys.readouterr().out  # nothing to skip


# --- rows, and what is made of them ------------------------------------------------------------------------------


def made_up(case: Case, mode: str, ratio: float, beside: float | None = None, threads: int = 2) -> list[Row]:
    """The rows of a case, with ratios that nobody has measured."""
    shape = ("group", "input_size", "hidden_size", "batch", "steps", "num_layers", "directions", "proj_size", "dtype")
    main = Row(
        **{name: getattr(case, name) for name in shape},
        experiment="after-torch", commit="0000000", date="2000-01-01", torch="2", numba="0", onnxruntime="1.99",
        device="Made Up CPU", threads=threads, case=case.name, mode=mode, backend="numba", peer="torch",
        peer_backend="oneDNN", pairs=7, p20_ms=1.0, p50_ms=1.0, p80_ms=1.0, peer_p50_ms=ratio, peer_p20_ms=ratio,
        peer_p80_ms=ratio, pair_ratio=ratio, gflops=1.0, peak_gflops=10.0, max_error=1e-7, reference="float64",
    )  # fmt: skip
    alone = replace(main, experiment="speed")
    peer = [] if beside is None else [replace(alone, peer="onnxruntime", peer_p50_ms=beside)]
    return [main, alone, *peer]


def rows_of(beside: tuple[float | None, float | None], threads: int = 2) -> list[Row]:
    """Two cases of one group, with these ratios to onnxruntime in inference."""
    cases = (TINY, replace(TINY, name="large", hidden_size=16))
    inference = [
        row
        for case, ratio in zip(cases, beside, strict=True)
        for row in made_up(case, "inference", 2.0, ratio, threads)
    ]
    return inference + [row for case in cases for row in made_up(case, "training", 3.0, threads=threads)]


def test_means():
    def means(rows: list[Row]) -> dict[str, float | None]:
        return {line.mode: line.onnxruntime for line in summary.summaries(rows) if line.group == "dense"}

    assert means(rows_of((4.0, 1.0))) == {"inference": pytest.approx(2.0), "training": None}
    assert means(rows_of((4.0, None))) == {"inference": pytest.approx(4.0), "training": None}  # of those that have it
    assert means(rows_of((None, None))) == {"inference": None, "training": None}


def test_table(capsys):
    tables.show_pairs(session.screen(), rows_of((4.0, 0.5)))
    shown = capsys.readouterr().out
    assert shown.count("vs onnxruntime") == 3  # in both tables and the caption
    assert "4.00×" in shown
    assert "0.50×" in shown
    assert "1.41×" in shown
    tables.show_pairs(session.screen(), rows_of((None, None)))
    assert "onnxruntime" not in capsys.readouterr().out


def reported(folder: pathlib.Path, **files: list[Row]) -> str:
    """The generated region of the page for results files of these names."""
    readme, page = folder / "README.md", folder / "page.md"
    for path in (readme, page):
        path.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    for name, found in files.items():
        rows.write(folder / "results" / f"{name.replace('_', '-')}.csv", found)
    report.update(folder / "results", readme, page, folder / "images")
    return page.read_text()


def test_report(tmp_path):
    text = reported(tmp_path, made_up_cpu_2t=rows_of((4.0, 0.5)))
    assert "with torch 2, numba 0 and onnxruntime 1.99" in text
    head, line = (
        next(line for line in text.splitlines() if line.startswith(start)) for start in ("| group", "| dense:")
    )
    assert head.endswith("| vs onnxruntime |")
    assert line.endswith("| 1.41× |")
    assert head.count("|") == line.count("|")
    assert "slower than onnxruntime: large (numba: 0.50×) (of 2 measured, in inference)" in text


def test_report_without_onnxruntime(tmp_path):
    text = reported(tmp_path, made_up_cpu_2t=rows_of((None, None)))
    assert "onnxruntime" not in text
    assert "| inference: speed | share of peak |\n" in text


def test_report_of_one_thread(tmp_path):
    """Its rows have a small table of their own, below the others of the same device, and no plots."""
    files = {"made_up_cpu_1t": rows_of((4.0, 4.0), threads=1), "made_up_cpu_2t": rows_of((None, None))}
    text = reported(tmp_path, **files)
    several, one = text.split("### Made Up CPU, 1 thread\n")
    assert "### Made Up CPU, 2 threads" in several
    assert "| group | cases | training | inference | vs onnxruntime |\n" in one
    assert "| dense | 2 | **3.00×** (3.00–3.00) | **2.00×** (2.00–2.00) | 4.00× |\n" in one
    assert "![" not in one
    assert not list((tmp_path / "images").glob("*-1t-*.png"))
    short = (tmp_path / "README.md").read_text()
    assert (
        "| Made Up CPU, 2 threads: dense, float32 | 2 | **3.00×** (3.00–3.00) | **2.00×** (2.00–2.00) | 0 of 4 |"
        in short
    )
    assert "1 thread" not in short
    assert "onnxruntime" not in several


# --- threads -----------------------------------------------------------------------------------------------------


def test_threads(own_threads, capsys):
    assert cli.main(["--threads", "1", "--case", "call-h16", "--list"]) == 0
    assert torch.get_num_threads() == 1
    assert machine.slug().endswith("-1t")
    assert machine.counted(1) == "1 thread"
    before = torch.get_num_threads()
    assert cli.main(["--threads", "2", "--device", "cuda", "--list"]) == 2
    assert torch.get_num_threads() == before
    for wrong in ("0", "two"):
        with pytest.raises(SystemExit):
            cli.main(["--threads", wrong, "--list"])


def test_memory_is_measured_with_as_many_threads(own_threads, monkeypatch):
    asked: list[list[str]] = []

    def start(command: list[str], **_: object) -> subprocess.CompletedProcess:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout='{"mib": 1.0}')

    monkeypatch.setattr(memory.subprocess, "run", start)
    torch.set_num_threads(1)
    memory.peak_memory_mib(TINY, OURS)
    assert '"case": "tiny", "provider": "lstmcore"' in asked[0][-2]
    assert asked[0][-1] == "1"
