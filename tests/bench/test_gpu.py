"""The GPU half of the benchmark, as far as a machine without a GPU can tell: rules, plans, rows, stages.

Rows here are made up and live in temporary folders; none of them is a result.
"""

from __future__ import annotations

import os
import pathlib
import re
import sys
import time
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]

from bench import (  # noqa: E402
    cudnn,
    gpu,
    gpu_cases,
    gpu_compile,
    gpu_environment,
    gpu_experiments,
    gpu_smoke,
    machine,
    memory,
    providers,
    report,
    results,
    run,
    summary,
    table,
    timing,
    verify,
)
from bench.cases import CASES, Case  # noqa: E402
from bench.gpu_cases import GPU_CASES, GPU_GROUPS, QUICK  # noqa: E402
from bench.providers import OURS, PEER  # noqa: E402
from bench.results import Row  # noqa: E402
from lstmcore import backends  # noqa: E402

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


def test_names_are_unique_and_groups_known():
    assert len(GPU_CASES) == len(list(gpu_cases._cases()))
    assert not set(GPU_CASES) & set(CASES)
    assert {case.group for case in GPU_CASES.values()} == set(GPU_GROUPS)
    assert all(case.device == "cuda" and name == case.name for name, case in GPU_CASES.items())
    assert all(case.device == "cpu" for case in CASES.values())


def test_the_product_is_complete():
    dense = {
        (case.dtype, case.hidden_size, case.batch, case.steps)
        for case in GPU_CASES.values()
        if case.group in ("cuda-bfloat16", "cuda-float16", "cuda-float32")
    }
    assert len(dense) == 3 * 7 * 5 * 4


def test_quick_covers_everything_within_its_time():
    quick = [GPU_CASES[name] for name in QUICK]
    assert [case for case in GPU_CASES.values() if case.quick] == quick
    assert {case.group for case in quick} == set(GPU_GROUPS)
    assert {cudnn.algorithm(case, backward=True) for case in quick} == set(cudnn.ALGORITHMS)
    assert {case.hidden_size for case in quick} >= set(gpu_cases.HIDDEN)
    assert {case.steps for case in quick} == set(gpu_cases.STEPS)
    assert gpu_cases.predicted_total_s(quick, gpu_cases.QUICK_PAIRS, gpu_cases.QUICK_S) < QUICK_LIMIT_S
    assert not any(gpu_cases.too_large(case, H200_BYTES) for case in quick)
    assert run.QUICK["cuda"].min_pairs >= 7
    assert run.FULL["cuda"].min_pairs >= 7


def test_the_bench_stage_has_time_for_the_quick_cases():
    stage = {stage.name: stage for stage in gpu.STAGES}["bench"]
    quick = [GPU_CASES[name] for name in QUICK]
    predicted = sum(gpu_cases.predicted_s(case, case.modes, gpu_cases.QUICK_PAIRS, gpu_cases.QUICK_S) for case in quick)
    visit = gpu.Visit(pathlib.Path(), gpu.shares(gpu.STAGES, 10)["bench"] - gpu.GRACE_S, None)
    compiling, measuring = (float(each[each.index("--limit-s") + 1]) for each in stage.commands(visit))
    assert compiling > 40  # what it took sixteen processors
    assert measuring > predicted
    assert compiling + measuring <= visit.work_s + 1


def test_memory_estimate():
    small, large = case("bfloat16", 64, 1), case("bfloat16", 2048, 256, steps=16384)
    assert gpu_cases.too_large(small, H200_BYTES) is None
    assert gpu_cases.memory_bytes(small) >= small.steps * 20 * 64 * 2
    reason = gpu_cases.too_large(large, H200_BYTES)
    assert reason is not None
    assert "139 GiB" in reason
    double = replace(small, dtype="float32", strict=True)
    assert gpu_cases.memory_bytes(double) > gpu_cases.memory_bytes(small)


def test_tf32_is_for_float32_on_a_gpu():
    assert case("float32").tf32
    assert not case("float32", strict=True).tf32
    assert not case("bfloat16").tf32
    assert not any(case.tf32 for case in CASES.values())


def test_precision_is_set_and_restored():
    setting = torch.backends.cudnn.rnn
    before = setting.fp32_precision
    for shape, expected in ((case("float32", strict=True), "ieee"), (case("float32"), "tf32"), (case(), before)):
        with providers.precision(shape):
            assert setting.fp32_precision == expected
        assert setting.fp32_precision == before


# --- rows --------------------------------------------------------------------------------------------------------


def made_up(case: Case, mode: str, ratio: float, algorithm: str = "STANDARD") -> list[Row]:
    """The two rows of a case, with a ratio that nobody has measured."""
    shared = {
        "commit": "0000000", "date": "2000-01-01", "torch": "2", "numba": "", "lstmcore": "0", "triton": "3",
        "device": "Made Up GPU", "threads": 132, "case": case.name, "group": case.group,
        "input_size": case.input_size, "hidden_size": case.hidden_size, "batch": case.batch, "steps": case.steps,
        "num_layers": case.num_layers, "directions": case.directions, "proj_size": case.proj_size,
        "mean_length": case.mean_length, "dtype": case.dtype, "mode": mode, "pairs": 7, "gflops": 1.0,
        "peak_gflops": None, "peak_share": None, "cudnn": "9.13.0", "precision": "tf32" if case.tf32 else None,
    }  # fmt: skip
    ours = {"provider": OURS, "backend": "triton (split, 64 slices)", "ratio": ratio, "pair_ratio": ratio}
    ours |= {"max_error": 1e-3, "reference": "float64"}
    peer = {"provider": PEER, "backend": f"cuDNN {algorithm}"}
    peer |= dict.fromkeys(("ratio", "pair_ratio", "max_error", "reference"))

    def row(rest: dict, ms: float) -> Row:
        times = {"p20_ms": ms - 0.25, "p50_ms": ms, "p80_ms": ms + 0.25}
        return Row(**shared, **rest, **times, memory_mib=100.0 * ms if mode == "training" else None)

    return [row(ours, 1.0), row(peer, ratio)]


def gpu_rows() -> list[Row]:
    """Made-up rows of a few cases: STANDARD three times as fast, PERSIST_STATIC twice, SMALL_H level."""
    rows = []
    for shape in (GPU_CASES[name] for name in QUICK if GPU_CASES[name].group in ("cuda-bfloat16", "cuda-float16")):
        for mode in shape.modes:
            algorithm = cudnn.label(shape, mode)
            rows += made_up(shape, mode, {"STANDARD": 3.0, "PERSIST_STATIC": 2.0}.get(algorithm, 1.0), algorithm)
    return rows


def test_rows_survive_a_round_trip(tmp_path):
    rows = gpu_rows()
    results.write(tmp_path / "rows.csv", rows)
    assert results.read(tmp_path / "rows.csv") == rows
    assert all(row.on_gpu for row in rows)


def test_committed_rows_still_read():
    paths = list(results.RESULTS.glob("*.csv"))
    assert paths
    for path in paths:
        rows = results.read(path)
        assert rows
        on_gpu = path.stem.endswith("sm")
        assert all(row.on_gpu == on_gpu for row in rows)


def test_files_of_other_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    names = [field.name for field in fields(Row)]
    for wrong in (names[:5], [*names, "surplus"], [*names[1:], names[0]]):
        path.write_text(",".join(wrong) + "\n")
        with pytest.raises(ValueError, match="expected the columns"):
            results.read(path)


def test_means_by_algorithm():
    found = {(line.group, line.mode): (line, long) for line, long in summary.by_algorithm(gpu_rows())}
    assert {group for group, _ in found} == {"cuDNN STANDARD", "cuDNN PERSIST_STATIC", "cuDNN SMALL_H"}
    line, long = found["cuDNN STANDARD", "training"]
    assert line.ratio == pytest.approx(3.0)
    assert long is not None
    assert 0 < long.cases < line.cases  # some have fewer than a thousand steps
    assert line.ours_share is None
    assert "cuDNN STANDARD 3.00×" in table.key_figures(gpu_rows())


def test_rows_of_a_cpu_have_no_algorithms():
    for path in results.RESULTS.glob("*t.csv"):
        assert not list(summary.by_algorithm(results.read(path)))


def test_report_of_gpu_rows(tmp_path):
    """In a folder that is thrown away: the README has a figure only where there are rows."""
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    results.write(folder / "made-up-gpu-132sm.csv", gpu_rows())
    report.update(folder, readme)
    text = readme.read_text()
    assert "### Made Up GPU, 132 multiprocessors" in text
    assert "cuDNN 9.13.0" in text
    assert "FMA" not in text
    assert re.search(r"\| cuDNN STANDARD \| \*\*3\.00×\*\*", text)
    assert "cuda-bfloat16: one layer" in text
    assert {path.name for path in folder.glob("*.png")} == {
        "made-up-gpu-132sm-gpu-speed.png",
        "made-up-gpu-132sm-gpu-width.png",
    }
    assert text.count("![") == 2


def test_readme_has_no_gpu_figure_without_rows():
    if any(row.on_gpu for path in results.RESULTS.glob("*.csv") for row in results.read(path)):
        pytest.skip("there are rows of a GPU")
    generated = (ROOT / "README.md").read_text().split(report.BEGIN)[1].split(report.END)[0]
    assert "cuDNN" not in generated
    assert "multiprocessor" not in generated


# --- a run, on a machine that says it has a GPU -------------------------------------------------------------------


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Cases of device "cuda" computed on the CPU: everything of a run but CUDA itself."""
    real_draw = providers.draw

    def draw(case, **options):
        return replace(real_draw(replace(case, device="cpu"), **options), case=case)

    device = SimpleNamespace(name="Made Up GPU", multi_processor_count=132, total_memory=2**30, major=9, minor=0)
    for module in (providers, run, gpu_experiments):
        monkeypatch.setattr(module, "draw", draw)
    monkeypatch.setattr(verify, "oracle_fits", lambda case: False)
    monkeypatch.setattr(machine, "gpu", lambda: device)
    monkeypatch.setattr(machine, "device_name", lambda device="cpu": "Made Up GPU")
    monkeypatch.setattr(machine, "cudnn", lambda: "9.13.0")
    monkeypatch.setitem(timing.CLOCKS, "cuda", timing.Clock(lambda: None, lambda: None))
    monkeypatch.setattr(timing, "SAMPLE_S", 1e-3)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20)
    monkeypatch.setattr(gpu_experiments, "BACKEND", "reference")


TINY = Case("tiny", "cuda-bfloat16", 8, 8, 2, 3, dtype="bfloat16", device="cuda", memory=True)
EFFORT = run.Effort(min_pairs=2, budget_s=0.0, memory=True)


def run_pretended(monkeypatch, path, *cases, backend="reference", **options) -> int:
    monkeypatch.setattr(run, "REGISTRIES", {"cuda": {case.name: case for case in cases}})
    return run.run(cases, None, backend, EFFORT, path, **options)


def test_run(pretended_gpu, monkeypatch, tmp_path, capsys):
    ragged = replace(TINY, name="ragged", group="cuda-packed", dtype="float32", mean_length=0.5)
    path = tmp_path / f"{machine.slug('cuda')}.csv"
    assert path.name == "made-up-gpu-132sm.csv"
    assert run_pretended(monkeypatch, path, TINY, ragged, commit="1234567") == 0
    rows = results.read(path)
    assert {(row.case, row.mode, row.provider) for row in rows} == {
        (name, mode, provider)
        for name in ("tiny", "ragged")
        for mode in ("inference", "training")
        for provider in (OURS, PEER)
    }
    assert {row.commit for row in rows} == {"1234567"}
    assert {row.threads for row in rows} == {132}
    assert {row.precision for row in rows if row.case == "ragged"} == {"tf32"}
    assert {row.memory_mib for row in rows} == {None, 1.0}
    assert all(row.peak_share is None and row.triton for row in rows)
    output = capsys.readouterr().out
    assert "tiny: inference" in output
    assert table.KEY_FIGURES in output.splitlines()[-1]


def test_run_goes_on_after_a_failure(pretended_gpu, monkeypatch, tmp_path, capsys):
    large = replace(TINY, name="large", hidden_size=4096, batch=4096)
    bad = replace(TINY, name="bad")
    real = run.measure

    def measure(case, *rest):
        if case.name == "bad":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return real(case, *rest)

    monkeypatch.setattr(run, "measure", measure)
    path = tmp_path / "rows.csv"
    assert run_pretended(monkeypatch, path, bad, large, TINY) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "failed: bad: OutOfMemoryError: CUDA out of memory. Tried to allocate" in output
    assert "not measured: large: it needs about" in output
    assert {row.case for row in results.read(path)} == {"tiny"}


def test_run_reports_what_a_backend_refuses(pretended_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(backends, "_why_not", lambda name, *_: f"no {name} here")
    assert run_pretended(monkeypatch, tmp_path / "rows.csv", TINY, backend="triton") == 0
    assert "not measured: tiny: backend 'triton' cannot run this call" in " ".join(capsys.readouterr().out.split())


def test_run_gives_no_figure_for_a_wrong_result(pretended_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verify, "SAME_DTYPE_BOUND", {torch.bfloat16: -1.0})
    path = tmp_path / "rows.csv"
    assert run_pretended(monkeypatch, path, TINY) == 1
    assert not path.exists()
    assert "wrong result: tiny" in " ".join(capsys.readouterr().out.split())


def test_run_ends_in_time(pretended_gpu, monkeypatch, tmp_path, capsys):
    assert run_pretended(monkeypatch, tmp_path / "rows.csv", TINY, limit_s=0.1) == 0
    assert "used up" in capsys.readouterr().out


def test_run_ends_where_the_gpu_is_lost(pretended_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "release", lambda: False)
    other = replace(TINY, name="other")
    path = tmp_path / "rows.csv"
    assert run_pretended(monkeypatch, path, TINY, other) == run.LOST
    assert f"{run.LOST_AT}tiny" in capsys.readouterr().out
    assert {row.case for row in results.read(path)} == {"tiny"}


def test_step_experiment(pretended_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_experiments, "step_cases", lambda: [replace(TINY, steps=4)])
    monkeypatch.setattr(gpu_experiments, "SHORT", 4)
    monkeypatch.setattr(gpu_experiments, "LONG", 8)
    assert gpu_experiments.main(["steps", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "steps.csv").read_text().splitlines()
    assert len(lines) == 1 + len(gpu_experiments.PASSES)
    assert lines[0].split(",") == [field.name for field in fields(gpu_experiments.StepRow)]
    assert gpu_experiments.main(["steps", "--out", str(tmp_path), "--limit-s", "0"]) == 0
    assert "used up" in capsys.readouterr().out


def test_handoff_experiment(pretended_gpu, monkeypatch, tmp_path, capsys):
    asked = []

    def latency(ctas, rows, width, dtype, steps):
        asked.append((ctas, rows, width, dtype, steps))
        return ctas / 100

    monkeypatch.setattr(gpu_experiments, "_module", lambda name: SimpleNamespace(handoff_latency=latency))
    assert gpu_experiments.main(["handoff", "--out", str(tmp_path)]) == 0
    assert [each[0] for each in asked] == [2, 4, 8, 16, 32, 64, 128, 132]
    assert len((tmp_path / "handoff.csv").read_text().splitlines()) == 1 + len(asked)
    assert capsys.readouterr().out.splitlines()[-1].startswith(table.KEY_FIGURES)
    monkeypatch.setattr(gpu_experiments, "_module", lambda name: None)
    assert gpu_experiments.main(["handoff", "--out", str(tmp_path)]) == run.NOTHING


def test_peak_memory_is_one_steps(pretended_gpu):
    asked = []
    runner = SimpleNamespace(training=lambda: asked.append("training"))
    assert memory.gpu_peak_mib(runner) == 1.0
    assert asked == ["training"]


# --- stages ------------------------------------------------------------------------------------------------------


def stage(name: str, *programs: str, limit_s: float = 10, **rest) -> gpu.Stage:
    """A stage of short Python programs."""
    commands = [[sys.executable, "-u", "-c", program] for program in programs]
    return gpu.Stage(name, "a test", limit_s, lambda visit: commands, lambda visit: commands, **rest)


def run_stages(tmp_path, minutes: float, *stages: gpu.Stage) -> tuple[list[gpu.Outcome], list[str]]:
    outcomes: list[gpu.Outcome] = []
    lines: list[str] = []
    gpu.run_stages(stages, minutes, gpu.Visit(tmp_path, 0.0, None), lines.append, False, outcomes)
    return outcomes, lines


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 0.5)
    monkeypatch.setattr(gpu, "RESERVE_S", 0.0)


def test_statuses_and_figures(tmp_path, short_grace):
    outcomes, _ = run_stages(
        tmp_path,
        1,
        stage("good", f"print('{table.KEY_FIGURES}3 of 3'); print('more')"),
        stage("bad", "print('=== 1 failed ==='); raise SystemExit(1)"),
        stage("absent", f"print('not there'); raise SystemExit({run.NOTHING})"),
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
    assert len(gpu.summary(outcomes)) == 3


def test_a_stage_may_use_what_is_left_over(tmp_path):
    seconds = []

    def commands(visit):
        seconds.append(visit.seconds)
        return [[sys.executable, "-c", ""]]

    stages = [gpu.Stage(name, "a test", 10, commands, commands) for name in ("one", "two", "three")]
    run_stages(tmp_path, 1, *stages)
    share = gpu.shares(stages, 1)["one"]
    assert share == pytest.approx((60 - gpu.RESERVE_S) / 3)
    assert seconds[0] == pytest.approx(share - gpu.GRACE_S, abs=0.1)
    assert share < seconds[1] < seconds[2]


def test_a_lost_gpu_costs_one_case(tmp_path, short_grace):
    """The benchmark is started again after the case that broke the GPU."""
    program = (
        "import sys\n"
        f"if '--after' in sys.argv: print('{table.KEY_FIGURES}the rest'); raise SystemExit(0)\n"
        f"print('{run.LOST_AT}some-case'); raise SystemExit({run.LOST})"
    )
    outcomes, lines = run_stages(tmp_path, 1, stage("bench", program, again=gpu._bench_again))
    assert outcomes[0].status == "failed"
    assert "the rest" in outcomes[0].figures
    assert any(line.endswith("--after some-case") for line in lines)
    again = gpu._bench_again(run.LOST, [f"{run.LOST_AT}b"], ["bench", "--after", "a"])
    assert again == ["bench", "--after", "b"]
    assert gpu._bench_again(1, [f"{run.LOST_AT}b"], ["bench"]) is None


def test_limits_add_up():
    assert sum(stage.limit_s for stage in gpu.STAGES) + gpu.RESERVE_S == 600
    assert sum(gpu.shares(gpu.STAGES, 5).values()) == pytest.approx(290)


def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys):
    without_cuda(monkeypatch)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr().out
    assert "there is no CUDA device" in output
    assert "no GPU figure exists" in output
    assert not (tmp_path / "out").exists()
    assert run.main(["--device", "cuda", "--quick"]) == 2
    assert gpu_experiments.main(["steps"]) == 2
    assert gpu_smoke.main([]) == 2
    assert gpu_compile.main([]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err


def test_dry_run(monkeypatch, tmp_path, capsys):
    without_cuda(monkeypatch)
    out = tmp_path / "out"
    assert gpu.main(["--dry-run", "--out", str(out), "--stage", "handoff"]) == 0
    output = capsys.readouterr().out
    assert "no GPU figure comes of it" in output
    assert "blocks of threads on an H100 or H200" in output
    last = output.splitlines()[-2:]
    assert [line.split()[:2] for line in last] == [["stage", "status"], ["handoff", "ok"]]
    names = sorted(path.name for path in out.iterdir())
    assert names == ["gpu.log", "summary.txt"]
    assert output.splitlines()[-1] in (out / "gpu.log").read_text()


def test_plans(capsys):
    """What the dry runs of the other stages print."""
    assert run.main(["--device", "cuda", "--quick", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in QUICK)
    assert "predicted: " in listed
    assert gpu_experiments.main(["steps", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert all(f"step-h{hidden}-b16" in planned for hidden in gpu_cases.HIDDEN)
    assert sum(map(gpu_experiments.predicted_s, gpu_experiments.step_cases())) < 120
    assert "no CUDA device" in dict(gpu_environment.facts())["device"] or torch.cuda.is_available()
    assert run.main(["--device", "cuda", "--after", "nothing"]) == 2
    assert run.main(["--device", "cuda", "--after", QUICK[-2], "--quick", "--list"]) == 0
    assert "1 of 545 cases" in capsys.readouterr().out


def test_commands_are_this_pythons_and_files_are_few(tmp_path):
    visit = gpu.Visit(tmp_path, 100.0, "1234567")
    for each in gpu.STAGES:
        for command in each.commands(visit):
            assert sys.executable in command
    bench = {each.name: each for each in gpu.STAGES}["bench"].commands(visit)[-1]
    assert bench[-2:] == ["--commit", "1234567"]
    assert bench[bench.index("--backend") + 1] == "triton"
    # the log, the table, three experiments, the rows and their plots
    plots = [name for name in report.PLOTS if name.startswith("gpu-")]
    assert 6 + len(plots) <= 8
