"""The GPU half of the benchmark, as far as a machine without a GPU can tell: rules, plans, rows, stages.

Rows here are made up and live in temporary folders; none of them is a result.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench import (
    cli,
    costs,
    cudnn,
    machine,
    measure,
    memory,
    providers,
    report,
    rows,
    session,
    summary,
    tables,
    timing,
    verify,
)
from bench.cases import CASES, GPU_QUICK, GROUPS, HIDDEN, STEPS_ON_GPU, Case, select
from bench.experiments import EXPERIMENTS, handoff, speed, steps
from bench.gpu import environment, launches, smoke, visit
from bench.measure import NOTHING, Task
from bench.rows import RESULTS, Row
from bench.session import LOST, LOST_AT
from bench.timing import Effort
from lstmcore.backends import choice

QUICK_LIMIT_S = 240  # what the quick benchmark may take of a visit

H200_BYTES = 139 * 2**30


def case(dtype="float16", hidden=256, batch=16, **rest) -> Case:
    settings = {"input_size": hidden, "steps": 1024, "dtype": dtype, "device": "cuda", **rest}
    return Case("a-case", "cuda-float16", hidden_size=hidden, batch=batch, **settings)


# --- which algorithm torch takes ---------------------------------------------------------------------------------

RULE = [  # (case, forward, backward)
    (case("float16", 256), "PERSIST_STATIC", "PERSIST_STATIC"),
    (case("float16", 1024, 128), "PERSIST_STATIC", "PERSIST_STATIC"),
    (case("float16", 1024, 136), "STANDARD", "STANDARD"),  # B at most 128
    (case("float16", 1024, 12), "STANDARD", "STANDARD"),  # B a multiple of 8
    (case("float16", 1152), "STANDARD", "STANDARD"),  # H at most 1024
    (case("float16", 320), "STANDARD", "STANDARD"),  # H a multiple of 128
    (case("float16", 256, input_size=200), "STANDARD", "STANDARD"),  # I too
    (case("float16", 256, num_layers=2), "STANDARD", "STANDARD"),
    (case("float16", 256, bidirectional=True), "STANDARD", "STANDARD"),
    (case("float16", 256, mean_length=0.5), "STANDARD", "STANDARD"),
    (case("float16", 256, proj_size=128), "STANDARD", "STANDARD"),
    (case("bfloat16", 256), "STANDARD", "STANDARD"),  # float16 only
    (case("float32", 256), "STANDARD", "STANDARD"),
    (case("bfloat16", 128), "STANDARD", "STANDARD"),  # though torch asks for SMALL_H
    (case("float32", 64, 1, num_layers=4, bidirectional=True), "SMALL_H", "SMALL_H"),  # whatever the batch and layers
    (case("float16", 128), "SMALL_H", "SMALL_H"),  # before PERSIST_STATIC
    (case("float16", 129, 17), "SMALL_H", "STANDARD"),  # backward stops sooner
    (case("float16", 192), "SMALL_H", "STANDARD"),
    (case("float16", 193), "STANDARD", "STANDARD"),
    (case("float64", 64), "STANDARD", "STANDARD"),
    (case("float16", 64, mean_length=0.5), "STANDARD", "STANDARD"),
    (case("float16", 64, proj_size=32), "STANDARD", "STANDARD"),
]


@pytest.mark.parametrize(("shape", "forward", "backward"), RULE)
def test_algorithm(shape, forward, backward):
    assert cudnn.algorithm(shape, backward=False) == forward
    assert cudnn.algorithm(shape, backward=True) == backward


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "expected"),
    [
        ((8, 0), 108, "PERSIST_STATIC"),
        ((8, 0), 56, "STANDARD"),  # a small device of the same kind
        ((8, 6), 108, "STANDARD"),
        ((10, 0), 148, "PERSIST_STATIC"),
    ],
)
def test_algorithm_by_device(capability, multiprocessors, expected):
    shape = case("float16", 512, 64)
    found = cudnn.algorithm(shape, backward=False, capability=capability, multiprocessors=multiprocessors)
    assert found == expected


def test_label_names_both_passes_where_they_differ():
    assert cudnn.label(case("float16", 512), "training") == "PERSIST_STATIC"
    assert cudnn.label(case("float16", 160), "training") == "SMALL_H, then STANDARD"
    assert cudnn.label(case("float16", 160), "inference") == "SMALL_H"


# --- the registry ------------------------------------------------------------------------------------------------


def test_every_group_is_measured_somewhere():
    assert {group.experiment for group in GROUPS.values()} <= {*EXPERIMENTS, "rounding", "smoke"}
    assert {case.group for case in CASES.values()} == set(GROUPS)
    assert all(name == case.name for name, case in CASES.items())


def test_the_product_is_complete():
    dense = {
        (case.dtype, case.hidden_size, case.batch, case.steps)
        for case in select(device="cuda")
        if case.group in ("cuda-bfloat16", "cuda-float16", "cuda-float32")
    }
    assert len(dense) == 3 * 7 * 5 * 4


def test_quick_covers_everything_within_its_time():
    quick = [CASES[name] for name in GPU_QUICK]
    assert select(device="cuda", quick=True) == quick == select(device="cuda")[: len(quick)]
    assert {case.group for case in quick} == {case.group for case in select(device="cuda")}
    assert {cudnn.algorithm(case, backward=True) for case in quick} == set(cudnn.ALGORITHMS)
    assert {case.hidden_size for case in quick} >= set(HIDDEN)
    assert {case.steps for case in quick} == set(STEPS_ON_GPU)
    assert costs.total_s(quick, partial(costs.predicted_s, effort=costs.QUICK)) < QUICK_LIMIT_S
    assert not any(costs.too_large(case, H200_BYTES) for case in quick)
    assert speed.SPEED.quick["cuda"].min_pairs >= 7
    assert speed.SPEED.full["cuda"].min_pairs >= 7


def test_the_bench_stage_has_time_for_the_quick_cases():
    stage = {stage.name: stage for stage in visit.STAGES}["bench"]
    predicted = sum(costs.predicted_s(CASES[name], costs.QUICK) for name in GPU_QUICK)
    its = visit.Visit(pathlib.Path(), seconds=visit.shares(visit.STAGES, 10)["bench"] - visit.GRACE_S)
    compiling, measuring = (float(each[each.index("--limit-s") + 1]) for each in stage.commands(its))
    assert compiling > 40  # what it took sixteen processors
    assert measuring > predicted
    assert compiling + measuring <= its.work_s + 1


def test_memory_estimate():
    small, large = case("bfloat16", 64, 1), case("bfloat16", 2048, 256, steps=16384)
    assert costs.too_large(small, H200_BYTES) is None
    assert costs.memory_bytes(small) >= small.steps * 20 * 64 * 2
    reason = costs.too_large(large, H200_BYTES)
    assert reason is not None
    assert "139 GiB" in reason
    double = replace(small, dtype="float32", strict=True)
    assert costs.memory_bytes(double) > costs.memory_bytes(small)


def test_tf32_is_for_float32_on_a_gpu():
    assert case("float32").tf32
    assert not case("float32", strict=True).tf32
    assert not case("bfloat16").tf32
    assert not any(case.tf32 for case in CASES.values() if case.device == "cpu")


def test_precision_is_set_and_restored():
    setting = torch.backends.cudnn.rnn
    before = setting.fp32_precision
    for shape, expected in ((case("float32", strict=True), "ieee"), (case("float32"), "tf32"), (case(), before)):
        with providers.precision(shape):
            assert setting.fp32_precision == expected
        assert setting.fp32_precision == before


# --- rows --------------------------------------------------------------------------------------------------------


def made_up(case: Case, mode: str, ratio: float, algorithm: str = "STANDARD") -> Row:
    """The row of a case, with a ratio that nobody has measured."""
    shape = ("group", "input_size", "hidden_size", "batch", "steps", "num_layers", "directions", "proj_size")
    memory = {"memory_mib": 100.0, "peer_memory_mib": 100.0 * ratio} if mode == "training" else {}
    return Row(
        **{name: getattr(case, name) for name in (*shape, "mean_length", "dtype")}, **memory,
        experiment="speed", commit="0000000", date="2000-01-01", torch="2", lstmcore="0", triton="3", cudnn="9.13.0",
        device="Made Up GPU", threads=132, case=case.name, precision="tf32" if case.tf32 else "", mode=mode,
        backend="triton (split, 64 slices)", peer="torch", peer_backend=f"cuDNN {algorithm}", pairs=7,
        p20_ms=0.75, p50_ms=1.0, p80_ms=1.25, peer_p20_ms=ratio - 0.25, peer_p50_ms=ratio, peer_p80_ms=ratio + 0.25,
        pair_ratio=ratio, gflops=1.0, max_error=1e-3, reference="float64",
    )  # fmt: skip


def gpu_rows() -> list[Row]:
    """Made-up rows of a few cases: STANDARD three times as fast, PERSIST_STATIC twice, SMALL_H level."""
    found = []
    for shape in (CASES[name] for name in GPU_QUICK if CASES[name].group in ("cuda-bfloat16", "cuda-float16")):
        for mode in shape.modes:
            algorithm = cudnn.label(shape, mode)
            ratio = {"STANDARD": 3.0, "PERSIST_STATIC": 2.0}.get(algorithm, 1.0)
            found.append(made_up(shape, mode, ratio, algorithm))
    return found


def test_rows_survive_a_round_trip(tmp_path):
    rows.write(tmp_path / "rows.csv", gpu_rows())
    assert rows.read(tmp_path / "rows.csv") == gpu_rows()
    assert all(row.on_gpu for row in gpu_rows())


def test_means_by_algorithm():
    found = {(line.group, line.mode): (line, long) for line, long in summary.by_algorithm(gpu_rows())}
    assert {group for group, _ in found} == {"cuDNN STANDARD", "cuDNN PERSIST_STATIC", "cuDNN SMALL_H"}
    line, long = found["cuDNN STANDARD", "training"]
    assert line.ratio == pytest.approx(3.0)
    assert long is not None
    assert 0 < long.cases < line.cases  # some have fewer than a thousand steps
    assert line.ours_share is None
    assert "cuDNN STANDARD 3.00×" in tables.key_figures(gpu_rows())


def test_rows_of_a_cpu_have_no_algorithms():
    for path in RESULTS.glob("*t.csv"):
        assert not list(summary.by_algorithm(rows.read(path)))


@pytest.mark.slow
def test_report_of_gpu_rows(tmp_path):
    """In a folder that is thrown away: there is a figure only where there are rows."""
    readme, page = tmp_path / "README.md", tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    for path in (readme, page):
        path.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    rows.write(tmp_path / "results" / "made-up-gpu-132sm.csv", gpu_rows())
    report.update(tmp_path / "results", readme, page, tmp_path / "docs" / "images")
    text, short = page.read_text(), readme.read_text()
    assert "### Made Up GPU, 132 multiprocessors" in text
    assert "cuDNN 9.13.0" in text
    assert "share of peak" not in text.lower()
    assert re.search(r"\| cuDNN STANDARD \| \*\*3\.00×\*\*", text)
    assert "cuda-bfloat16: one layer" in text
    drawn = {f"made-up-gpu-132sm-{name}.png" for name in ("speed", "width")}
    assert {path.name for path in (page.parent / "images").iterdir()} == drawn
    assert set(re.findall(r"!\[.*\]\((.*)\)", text)) == {f"images/{name}" for name in drawn}
    assert "| Made Up GPU, 132 multiprocessors: dense, 16-bit |" in short
    assert "(docs/page.md)" in short
    assert "![" not in short


# --- a run, on a machine that says it has a GPU -------------------------------------------------------------------


class Event:
    """One of CUDA's, on the host's clock."""

    def __init__(self, **_: object) -> None: ...

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Cases of device "cuda" computed on the CPU: everything of a run but CUDA itself."""
    real_draw = providers.draw

    def draw(case, **options):
        return replace(real_draw(replace(case, device="cpu"), **options), case=case)

    device = SimpleNamespace(name="Made Up GPU", multi_processor_count=132, total_memory=2**31, major=9, minor=0)
    for module in (providers, measure, steps):
        monkeypatch.setattr(module, "draw", draw)
    monkeypatch.setattr(verify, "oracle_fits", lambda case: False)
    monkeypatch.setattr(machine, "gpu", lambda: device)
    monkeypatch.setattr(machine, "device_name", lambda device="cpu": "Made Up GPU")
    monkeypatch.setattr(machine, "cudnn", lambda: "9.13.0")
    monkeypatch.setitem(timing.CLOCKS, "cuda", timing.Clock(lambda: None, lambda: None))
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-3)
    monkeypatch.setattr(launches, "limits", lambda: (132, 227 * 1024, True))
    monkeypatch.setattr(launches, "settle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20)


TINY = Case("tiny", "cuda-bfloat16", 8, 8, 2, 3, dtype="bfloat16", device="cuda", tags=frozenset({"memory"}))
TASK = Task(Effort(min_pairs=2, budget_s=0.0, memory=True), "reference")


def run_pretended(registry, path, *cases, task=TASK, **options) -> int:
    registry(*cases)
    return session.Session([(speed.SPEED, task)], path, **options).run(cases)


def test_run(pretended_gpu, registry, tmp_path, capsys):
    ragged = replace(TINY, name="ragged", group="cuda-packed", dtype="float32", mean_length=0.5)
    path = tmp_path / f"{machine.slug('cuda')}.csv"
    assert path.name == "made-up-gpu-132sm.csv"
    assert run_pretended(registry, path, TINY, ragged, commit="1234567") == 0
    found = rows.read(path)
    assert {(row.case, row.mode) for row in found} == {
        (name, mode) for name in ("tiny", "ragged") for mode in ("inference", "training")
    }
    assert {row.commit for row in found} == {"1234567"}
    assert {row.threads for row in found} == {132}
    assert {row.precision for row in found if row.case == "ragged"} == {"tf32"}
    assert {(row.memory_mib, row.peer_memory_mib) for row in found} == {(None, None), (1.0, 1.0)}
    assert all(row.peak_share is None and row.triton for row in found)
    output = capsys.readouterr().out
    assert "tiny, inference, against torch: " in output
    assert tables.KEY_FIGURES in output.splitlines()[-1]


@pytest.mark.slow
def test_run_goes_on_after_a_failure(pretended_gpu, registry, monkeypatch, tmp_path, capsys):
    large = replace(TINY, name="large", hidden_size=4096, batch=4096)
    bad = replace(TINY, name="bad")
    real = speed.checked

    def checked(case, *rest):
        if case.name == "bad":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return real(case, *rest)

    monkeypatch.setattr(speed, "checked", checked)
    path = tmp_path / "rows.csv"
    assert run_pretended(registry, path, bad, large, TINY) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "failed: bad: OutOfMemoryError: CUDA out of memory. Tried to allocate" in output
    assert "not measured: large: it needs about" in output
    assert {row.case for row in rows.read(path)} == {"tiny"}


def test_run_reports_what_a_backend_refuses(pretended_gpu, registry, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(choice, "_why_not", lambda backend, *_: f"no {backend.name} here")
    assert run_pretended(registry, tmp_path / "rows.csv", TINY, task=replace(TASK, backend="triton")) == 0
    assert "not measured: tiny: backend 'triton' cannot run this call" in " ".join(capsys.readouterr().out.split())


def test_run_gives_no_figure_for_a_wrong_result(pretended_gpu, registry, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verify, "SAME_DTYPE_BOUND", {torch.bfloat16: -1.0})
    path = tmp_path / "rows.csv"
    assert run_pretended(registry, path, TINY) == 1
    assert not path.exists()
    assert "wrong result: tiny" in " ".join(capsys.readouterr().out.split())


def test_run_ends_in_time(pretended_gpu, registry, tmp_path, capsys):
    assert run_pretended(registry, tmp_path / "rows.csv", TINY, limit_s=0.1) == 0
    assert "used up" in capsys.readouterr().out


@pytest.mark.slow
def test_run_ends_where_the_gpu_is_lost(pretended_gpu, registry, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(session, "release", lambda: False)
    other = replace(TINY, name="other")
    path = tmp_path / "rows.csv"
    assert run_pretended(registry, path, TINY, other) == LOST
    assert f"{LOST_AT}tiny" in capsys.readouterr().out
    assert {row.case for row in rows.read(path)} == {"tiny"}


def test_run_refuses_a_file_of_other_columns_before_it_measures(pretended_gpu, registry, monkeypatch, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("commit,date\n")
    with pytest.raises(ValueError, match="move the file away"):
        run_pretended(registry, path, TINY)


@pytest.mark.slow
def test_step_experiment(pretended_gpu, registry, tmp_path, capsys):
    registry(replace(TINY, name="step-tiny", group="step", steps=4))
    arguments = ["steps", "--out", str(tmp_path), "--backend", "reference"]
    assert cli.main(arguments) == 0
    (path,) = tmp_path.glob("*.csv")
    found = rows.read(path)
    assert [row.mode for row in found] == list(steps.PASSES)
    every = {"predicted_us", "host_us"}
    assert [set(row.details) for row in found] == [every | {"product_us"}] * 2 + [every]
    assert all(float(row.details["host_us"]) > 0 for row in found if row.mode != "backward")
    output = capsys.readouterr().out
    assert "step-tiny, backward, against torch: " in output
    assert output.splitlines()[-1].startswith(f"{tables.KEY_FIGURES}µs a step at B 16: ")
    assert cli.main([*arguments, "--limit-s", "0"]) == 0
    assert "used up" in capsys.readouterr().out


def test_handoff_experiment(pretended_gpu, monkeypatch, tmp_path, capsys):
    probe = pytest.importorskip("lstmcore.kernels.gpu.probe", reason="it needs Triton, which is not installed")
    asked = []

    def latency(ctas, rows, width, dtype, steps):
        asked.append((ctas, rows, width, dtype, steps))
        return 0.4 + 0.2 * math.log2(ctas) + 0.03 * ctas * rows * width * dtype.itemsize / 1000

    monkeypatch.setattr(probe, "handoff_latency", latency)
    monkeypatch.setattr(handoff, "spread", lambda share, limit_s: share(1, 9) or "compiled")
    assert cli.main(["handoff", "--out", str(tmp_path)]) == 0
    compiled = [each for each in asked if each[-1] == handoff.FEW]
    assert len(compiled) == 3
    timed = [each for each in asked if each not in compiled]
    powers = [2, 4, 8, 16, 32, 64, 128]
    expected = {2: [*powers, 132], 8: [*powers, 132], 32: powers, 128: powers[:5]}  # what a block can hold
    assert timed == [(blocks, 8, units, torch.bfloat16, 4096) for units in expected for blocks in expected[units]]
    (path,) = tmp_path.glob("*.csv")
    found = [(int(row.details["blocks"]), int(row.details["bytes"]) // 16) for row in rows.read(path)]
    assert found == [(blocks, units) for blocks, _, units, *_ in timed]
    told = capsys.readouterr().out
    fitted = dict(re.findall(r"^(latency|handoff|read) +\S+ +(\S+)", told, re.MULTILINE))
    for name, us in (("latency", 0.4), ("handoff", 0.2), ("read", 0.03)):
        assert float(fitted[name]) == pytest.approx(us, rel=0.01)
    assert re.search(r"^   132 +1.94 .* -$", told, re.MULTILINE)
    assert told.splitlines()[-1].startswith(tables.KEY_FIGURES)
    less = f"{costs.COMPILE_S - 1}"  # than a case's kernels take, which here have been compiled beforehand
    assert cli.main(["handoff", "--out", str(tmp_path), "--limit-s", less]) == 0
    assert "used up" not in capsys.readouterr().out


def test_smoke(pretended_gpu, monkeypatch, capsys):
    monkeypatch.setattr(smoke, "draw", providers.draw)
    monkeypatch.setattr(smoke, "BACKEND", "reference")
    assert smoke.run(case="smoke") == 0
    told = capsys.readouterr().out
    assert told.count("largest error") == 6
    assert f"{tables.KEY_FIGURES}6 of 6 small cases are right" in told
    monkeypatch.setattr(verify, "_floor", lambda case: -1.0)
    monkeypatch.setattr(verify, "SAME_DTYPE_BOUND", dict.fromkeys(verify.SAME_DTYPE_BOUND, -1.0))
    assert smoke.run(case="smoke") == 1
    assert "wrong result: smoke-h40" in capsys.readouterr().out
    assert smoke.run(unchecked=True) == 0
    assert "6 of 6 small cases ran" in capsys.readouterr().out
    monkeypatch.setattr(smoke, "BACKEND", "triton")
    monkeypatch.setattr(choice, "_why_not", lambda backend, *_: f"no {backend.name} here")
    assert smoke.run(case="smoke") == NOTHING
    assert "not run: backend 'triton' cannot run this call" in capsys.readouterr().out

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(smoke, "algorithm", broken)
    assert smoke.run(case="smoke-h40") == 1, "what breaks is not what a backend refuses"
    assert "failed: CUDA error" in capsys.readouterr().out
    assert smoke.run(case="nothing") == 2
    assert "expected one of smoke-h40, " in capsys.readouterr().out


def test_peak_memory_is_one_steps(pretended_gpu):
    asked = []
    runner = SimpleNamespace(training=lambda: asked.append("training"))
    assert memory.gpu_peak_mib(runner) == 1.0
    assert asked == ["training"]


# --- stages ------------------------------------------------------------------------------------------------------


def stage(name: str, *programs: str, limit_s: float = 10, **rest) -> visit.Stage:
    """A stage of short Python programs."""
    commands = [[sys.executable, "-u", "-c", program] for program in programs]
    return visit.Stage(name, "a test", limit_s, lambda _: commands, **rest)


def run_stages(tmp_path, minutes: float, *stages: visit.Stage) -> tuple[list[visit.Outcome], list[str]]:
    lines: list[str] = []
    return list(visit.run_stages(stages, minutes, visit.Visit(tmp_path), lines.append)), lines


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(visit, "GRACE_S", 0.5)
    monkeypatch.setattr(visit, "RESERVE_S", 0.0)


def test_statuses_and_figures(tmp_path, short_grace):
    outcomes, _ = run_stages(
        tmp_path,
        1,
        stage("good", f"print('{tables.KEY_FIGURES}3 of 3'); print('more')"),
        stage("bad", "print('=== 1 failed ==='); raise SystemExit(1)"),
        stage("absent", f"print('not there'); raise SystemExit({NOTHING})"),
        stage("unable", "print('x: Device not supported'); raise SystemExit(1)", unable="Device not supported"),
        stage("both", "print('one')", "print('two'); raise SystemExit(4)"),
    )
    assert [(each.name, each.status, each.figures) for each in outcomes] == [
        ("good", "ok", "3 of 3"),
        ("bad", "failed", "1 failed"),
        ("absent", "skipped", "not there"),
        ("unable", "skipped", "x: Device not supported"),
        ("both", "failed", "one; two"),
    ]


@pytest.mark.parametrize(("kernel", "status"), [("nvjet_sm90_tst", "ok"), ("lstm_fwd_kernel", "failed")])
def test_hazards_in_other_kernels_are_not_ours(tmp_path, short_grace, kernel, status):
    report = (
        f"========= Error: Race reported between Read access at {kernel}+0xaf0\n"
        f"=========     and Write access at {kernel}+0x27e0 [16 hazards]\n"
        "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
    )
    (sanitizer,) = (each for each in visit.STAGES if each.name == "sanitizer")
    program = f"print({report!r}); raise SystemExit(9)"
    outcomes, _ = run_stages(tmp_path, 1, stage("races", program, excused=sanitizer.excused))
    assert [each.status for each in outcomes] == [status]


def test_a_stage_that_hangs_is_ended_with_all_it_started(tmp_path, short_grace):
    """And the next one still runs, and the table still comes."""
    child = tmp_path / "child"
    hang = (
        "import os, pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "held = subprocess.Popen([sys.executable, '-c', 'import signal, time;"
        " signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(held.pid))\n"
        "print('started')\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    outcomes, lines = run_stages(tmp_path, 8 / 60, stage("hangs", hang), stage("next", "print('here')"))
    assert time.monotonic() - started < 12
    assert [each.status for each in outcomes] == ["timed out", "ok"]
    assert outcomes[0].figures == "started"
    pid = int(child.read_text())
    for _ in range(50):
        state = pathlib.Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split(") ")[1][0] == "Z":  # gone, or dead and not yet reaped
            break
        time.sleep(0.1)
    else:
        os.kill(pid, 9)
        pytest.fail("what the stage started is still there")
    assert any("are over" in line for line in lines)
    assert len(visit.summary(outcomes)) == 3


def test_a_stage_may_use_what_is_left_over(tmp_path):
    seconds = []

    def commands(its):
        seconds.append(its.seconds)
        return [[sys.executable, "-c", ""]]

    stages = [visit.Stage(name, "a test", 10, commands) for name in ("one", "two", "three")]
    run_stages(tmp_path, 1, *stages)
    share = visit.shares(stages, 1)["one"]
    assert share == pytest.approx((60 - visit.RESERVE_S) / 3)
    assert seconds[0] == pytest.approx(share - visit.GRACE_S, abs=0.1)
    assert share < seconds[1] < seconds[2]


def test_a_lost_gpu_costs_one_case(tmp_path, short_grace):
    """The benchmark is started again after the case that broke the GPU."""
    program = (
        "import sys\n"
        f"if '--after' in sys.argv: print('{tables.KEY_FIGURES}the rest'); raise SystemExit(0)\n"
        f"print('{LOST_AT}some-case'); raise SystemExit({LOST})"
    )
    outcomes, lines = run_stages(tmp_path, 1, stage("bench", program, again=visit._bench_again))
    assert outcomes[0].status == "failed"
    assert "the rest" in outcomes[0].figures
    assert any(line.endswith("--after some-case") for line in lines)
    again = visit._bench_again(LOST, [f"{LOST_AT}b"], ["bench", "--after", "a"])
    assert again == ["bench", "--after", "b"]
    assert visit._bench_again(1, [f"{LOST_AT}b"], ["bench"]) is None


def test_limits_add_up():
    assert sum(stage.limit_s for stage in visit.STAGES) + visit.RESERVE_S == 600
    assert sum(visit.shares(visit.STAGES, 5).values()) == pytest.approx(290)


def test_a_short_visit_gives_stages_their_least():
    """What takes so long to start would not come to anything; where there is no room for that either, all get less."""
    stages = [each for each in visit.STAGES if each.name in ("smoke", "streams", "designs")]
    short, shorter = (visit.shares(stages, minutes) for minutes in (2.0, 1.0))
    assert short["smoke"] == 45
    assert short["streams"] == 35
    assert sum(short.values()) == pytest.approx(110)
    assert sum(shorter.values()) == pytest.approx(50)
    assert all(0 < shorter[name] < short[name] for name in short)
    assert visit.shares(stages, 10)["smoke"] > 100, "a long one gives them more"


def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    without_cuda(monkeypatch)
    assert cli.main(["gpu", "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr().out
    assert "there is no CUDA device" in output
    assert "no GPU figure exists" in output
    assert not (tmp_path / "out").exists()
    for command in (["--device", "cuda", "--quick"], ["steps"], ["handoff"], ["smoke"], ["streams"], ["compile"]):
        assert cli.main(command) == 2
        assert "there is no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_dry_run(monkeypatch, tmp_path, capsys):
    without_cuda(monkeypatch)
    out = tmp_path / "out"
    assert cli.main(["gpu", "--dry-run", "--out", str(out), "--stage", "handoff"]) == 0
    output = capsys.readouterr().out
    assert "no GPU figure comes of it" in output
    assert "blocks of threads on an H100 or H200" in output
    names = sorted(path.name for path in out.iterdir())
    assert names == ["gpu.log", "summary.txt"]
    last = (out / "summary.txt").read_text()
    assert [line.split()[:2] for line in last.splitlines()[:2]] == [["stage", "status"], ["handoff", "ok"]]
    assert "from the rows in bench/results: nothing is measured now" in last
    assert "bytes from L2 46%" in last
    assert last in output
    assert last in (out / "gpu.log").read_text()
    assert cli.main(["gpu", "--dry-run", "--out", str(out), "--stage", "nothing"]) == 2
    assert "unknown stage nothing: expected install, environment, smoke, tests, streams," in capsys.readouterr().out


def test_plans(capsys):
    """What the dry runs of the other stages print."""
    assert cli.main(["--device", "cuda", "--quick", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in GPU_QUICK)
    assert "predicted: " in listed
    assert cli.main(["steps", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert all(f"step-h{hidden}-b16" in planned for hidden in HIDDEN)
    assert float(re.search(r"^predicted: (.*) minutes", planned, re.MULTILINE)[1]) < 2
    assert "no CUDA device" in dict(environment.facts())["device"] or torch.cuda.is_available()
    assert cli.main(["--device", "cuda", "--after", "nothing"]) == 2
    assert cli.main(["--device", "cuda", "--after", GPU_QUICK[-2], "--quick", "--list"]) == 0
    assert "1 of 545 cases" in capsys.readouterr().out


def test_commands_are_this_pythons(tmp_path):
    its = visit.Visit(tmp_path, "1234567", seconds=100.0)
    parser = cli.parser()
    for each in visit.STAGES:
        for command in (*each.commands(its), *each.commands(replace(its, dry=True))):
            assert sys.executable in command
            if "bench" in command and "--help" not in command:
                parser.parse_args(command[command.index("bench") + 1 :])
    bench = {each.name: each for each in visit.STAGES}["bench"].commands(its)[-1]
    assert bench[-2:] == ["--commit", "1234567"]
    assert bench[bench.index("--backend") + 1] == "triton"
