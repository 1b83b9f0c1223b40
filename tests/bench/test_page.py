"""The report's page: complete, self-contained, the same for the same rows, and made of them alone.

Rows here are made up, but for those of the committed files.
"""

from __future__ import annotations

import base64
import html
import re
from dataclasses import replace

import pytest

from bench import curves, findings, page, report, rows
from bench.cases import CASES, GPU_QUICK, MODES
from bench.experiments import stream
from bench.rows import COST, RESULTS, Row

CPU = {"device": "Made Up <1>", "threads": 2, "torch": "2.0", "numba": "0.5", "commit": "abcdef1", "date": "2020-01-02"}
GPU = CPU | {"device": "Made Up GPU", "threads": 132, "cudnn": "9.9", "triton": "3.3"}


def row(case: str, experiment: str = "speed", mode: str = "training", **columns: object) -> Row:
    """Twice as fast as torch, unless stated otherwise."""
    shape = CASES[case]
    names = ("group", "input_size", "hidden_size", "batch", "steps", "dtype")
    own = {name: getattr(shape, name) for name in names} | (GPU if shape.device == "cuda" else CPU)
    times = {"p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": 1.0, "peer_p20_ms": 2.0, "peer_p50_ms": 2.0, "peer_p80_ms": 2.0}
    given = {"experiment": experiment, "case": case, "mode": mode, "peer": "torch", "backend": "numba", "pairs": 7}
    return Row(**own | times | given | columns)  # type: ignore[arg-type]


def step(peer: str, ms: float) -> Row:
    """A single step beside a peer that takes so long."""
    details = {"p99_us": "1500", "peer_p99_us": "2500"}
    own = row("call-h16-b1-t1", "stream", "inference", peer=peer, peer_p50_ms=ms, details=details)
    return replace(own, case="stream-h16-b1")


def cpu_rows() -> list[Row]:
    """Of everything that the page shows of a CPU; at its longest, torch and plain ours run out of memory."""
    found = []
    for experiment in ("after-torch", "speed"):
        for mode in MODES:
            for case in ("dense-h16-b32-t1000", "dense-h64-b8-t1000", "steps-t100", "steps-t4096"):
                found.append(row(case, experiment, mode, gflops=50.0, peak_gflops=100.0))
    for steps in (1024, 4096):
        case = f"long-h256-b16-t{steps}"
        found.append(row(case, "long", memory_mib=10.0 * steps, peer_memory_mib=20.0 * steps))
        found.append(row(case, "long", variant="recompute", memory_mib=5.0 * steps, peer_memory_mib=20.0 * steps))
        found.append(row(case, "long", "inference"))
    fails = dict.fromkeys(("peer_fails", "plain_fails"), "out of memory, more than 1 GiB")
    nothing = dict.fromkeys(("peer_p20_ms", "peer_p50_ms", "peer_p80_ms"))
    found.append(row("long-h256-b16-t131072", "long", variant="recompute", memory_mib=9e4, details=fails, **nothing))
    return [
        *found,
        *(step(peer, ms) for peer, ms in (("torch.nn.LSTM", 3.0), ("torch.nn.LSTMCell", 4.0), ("onnxruntime", 0.5))),
    ]


def gpu_rows() -> list[Row]:
    cases = [name for name in GPU_QUICK if name.startswith("cuda-bfloat16-h512-b16-")]
    return [
        row(case, "speed", mode, backend="triton (split)", peer_backend="cuDNN STANDARD", memory_mib=1.0)
        for case in cases
        for mode in MODES
    ]


def pictures(text: str) -> dict[str, str]:
    """The SVG of each figure, by what it is said to show."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)">', text)
    assert len(found) == text.count("<img")
    return {html.unescape(alt): base64.b64decode(data).decode() for alt, data in found}


def words(svg: str) -> str:
    """What a figure says: matplotlib draws letters as paths, and leaves their text in comments."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", svg))


def check_self_contained(text: str) -> None:
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b|@import|url\(", text)
    assert all(target.startswith("data:") for target in re.findall(r'\bsrc(?:set)?="([^"]*)"', text))
    anchors = re.findall(r'href="([^"]*)"', text)
    assert all(target.startswith("#") for target in anchors)
    assert {target[1:] for target in anchors} <= set(re.findall(r'id="([^"]*)"', text))
    for svg in pictures(text).values():
        assert all(target.startswith(("#", "data:")) for target in re.findall(r'href="([^"]*)"', svg))
        assert "<script" not in svg
        assert "prefers-color-scheme: dark" in svg


@pytest.fixture(scope="module")
def made_up() -> str:
    return page.page(
        {"made-up-2t": cpu_rows(), "made-up-gpu-132sm": gpu_rows(), "empty-2t": [row("reset-h16-b8-t1000", "control")]}
    )


def part(text: str, name: str) -> str:
    """What the page says of a machine."""
    return re.split(r"<h2", text.split(f'<h2 id="{name}">')[1])[0]


def test_self_contained(made_up):
    check_self_contained(made_up)


def test_a_machine_with_everything(made_up):
    own = part(made_up, "made-up-2t")
    assert own.startswith("Made Up &lt;1&gt;, 2 threads</h2>")
    captions = {each.caption for drawings, _ in page.PARTS.values() for each in drawings}
    shown = {alt.partition(": ")[0] for alt in pictures(own)}
    assert shown == captions - {"Time per step by hidden size"}  # that is of GPUs
    for title, (_, missing) in page.PARTS.items():
        assert f"<h3>{title}</h3>" in own
        assert missing not in own
    assert "commit abcdef1 with torch 2.0 and numba 0.5" in own
    assert "<td>abcdef1</td><td>2020-01-02</td><td>2.0</td>" in made_up


def test_what_a_machine_has_no_rows_of_is_said(made_up):
    own = part(made_up, "made-up-gpu-132sm")
    for title in ("Share of the limit", "Latency of a single step"):
        assert f"<h3>{title}</h3>\n<p class=quiet>{html.escape(page.PARTS[title][1], quote=False)}</p>" in own
    assert any("Time per step to the longest" in alt for alt in pictures(own))
    assert "empty-2t" not in made_up
    only = page.page({"only-2t": [row("long-h64-b1-t1024", "long")]})
    for _, missing in page.PARTS.values():
        assert missing in only


def test_where_memory_runs_out(made_up):
    found = {alt.partition(": ")[0]: words(svg) for alt, svg in pictures(part(made_up, "made-up-2t")).items()}
    for caption in ("Time per step to the longest sequences", "Peak memory as the sequence grows"):
        for text in ("torch: out of memory", "ours: out of memory", "131,072", "lstmcore.LSTM, recompute"):
            assert text in found[caption]
    assert "out of memory" not in found["Time per step as the sequence grows"]


def test_single_steps_beside_every_peer(made_up):
    (shown,) = (words(svg) for alt, svg in pictures(made_up).items() if alt.startswith("Latency"))
    for text in ("lstmcore.Stream", "torch.nn.LSTM", "torch.nn.LSTMCell", "onnxruntime", "H 16, B 1"):
        assert text in shown.splitlines()


def test_where_ours_is_slower_is_listed(made_up):
    own = part(made_up, "made-up-2t")
    raced = sum(each.peer_p50_ms is not None for each in cpu_rows())
    assert f"In 1 of {raced} measurements" in own
    assert "<td>stream-h16-b1 (numba)</td><td>inference</td><td>alone</td><td>onnxruntime</td><td>0.50×</td>" in own
    assert "In none of 4." in part(made_up, "made-up-gpu-132sm")


def test_all_of_many_lost_are_there():
    lost = [row("dense-h16-b32-t1000", variant=str(at), p50_ms=2.1 + at) for at in range(page.SHOWN + 3)]
    cost = row("reset-h16-b8-t1000", "control", kind=COST, p50_ms=9.0)
    found, of = page.slower([*lost, cost, row("dense-h64-b8-t1000")])
    assert (len(found.lines), of) == (page.SHOWN + 3, page.SHOWN + 4)
    assert found.lines[0][-1] == "0.12×"  # the worst first
    text = page.page({"made-up-2t": lost})
    assert f"<summary>all {page.SHOWN + 3}</summary>" in text
    assert all(f"dense-h16-b32-t1000, {at} (numba)" in text for at in range(page.SHOWN + 3))


def test_the_same_rows_make_the_same_page():
    assert page.page({"made-up-2t": cpu_rows()}) == page.page({"made-up-2t": cpu_rows()})


@pytest.mark.parametrize("experiment", ["after-torch", "speed", "long", "stream"])
def test_another_row_makes_another_page(made_up, experiment):
    changed = cpu_rows()
    at = next(at for at, each in enumerate(changed) if each.experiment == experiment and each.peer_p50_ms)
    changed[at] = replace(changed[at], peer_p50_ms=1.75)
    assert part(page.page({"made-up-2t": changed}), "made-up-2t") != part(made_up, "made-up-2t")


def test_figures_are_the_rows():
    fast = [row("dense-h16-b32-t1000", "after-torch", mode, peer_p50_ms=7.25) for mode in MODES]
    text = page.page({"made-up-2t": fast})
    (heatmap,) = pictures(text).values()
    assert words(heatmap).count("7.25×") == 2
    assert text.count("<strong>7.25×</strong>") == 6  # dense, and dense in all, in both modes; and in short


def test_markup():
    assert page.inline("a < **b** & `c`") == "a &lt; <strong>b</strong> &amp; <code>c</code>"
    table = findings.Table(("x", "y"), [("a", 1.5)])
    assert "<tr><td>a</td><td>1.5</td></tr>" in page.table(table)
    assert list(report.markdown(table)) == ["| x | y |", "|---|--:|", "| a | 1.5 |"]


def test_lines_along_the_steps():
    (panel,) = (each for each in curves.panels(cpu_rows()) if each.title == "training, H 256, B 16")
    found = {
        line.label: line.points
        for line in curves.lines(panel, lambda row: row.memory_mib, lambda row: row.peer_memory_mib)
    }
    assert found == {
        "torch.nn.LSTM": {1024: 20480.0, 4096: 81920.0},
        "lstmcore.LSTM": {1024: 10240.0, 4096: 40960.0},
        "lstmcore.LSTM, recompute": {1024: 5120.0, 4096: 20480.0, 131072: 9e4},
    }
    assert curves.time_along([row("dense-h16-b32-t1000")]) is None
    assert curves.memory_along([row("long-h64-b1-t1024", "long", memory_mib=1.0)]) is None  # one T is no line
    assert curves.latency([row("dense-h16-b32-t1000")]) is None


def test_everyone_who_takes_single_steps_is_drawn():
    names = [*stream.peers(CASES["call-h16-b1-t1"])]
    figure = curves.latency([step(name, 2.0) for name in names])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lstmcore.Stream", *names]


@pytest.mark.slow
def test_the_committed_rows_are_all_there(tmp_path, monkeypatch):
    files = {path.stem: rows.read(path) for path in RESULTS.glob("*.csv")}
    text = report.web_page()
    check_self_contained(text)
    for name, found in files.items():
        own = part(text, name)
        assert own.startswith(html.escape(findings.title(found[0])))
        for title in page.PARTS:
            assert f"<h3>{title}</h3>" in own
        for version in {each.commit for each in found if each.experiment in page.EXPERIMENTS}:
            assert version in text
    assert list(report.ordered()) == re.findall(r'<h2 id="([^"]*)"', text)
