"""The pipelines of libraries, on one that needs none: what agrees passes, what does not is found; rows and table."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lstmcore
from bench import report
from bench.libraries import pages, parity, table
from bench.libraries.parity import Mismatch
from bench.libraries.pipeline import Job, Pipeline, run
from bench.libraries.table import Row

ROOT = pathlib.Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
GROUPS = re.search(r"^GROUPS \?= (.+)$", MAKEFILE, re.MULTILINE)[1].split()


def job(model: nn.Module, steps: int = 3) -> Job:
    """A regression with Adam."""
    x, y = torch.randn(24, 4, 6), torch.randn(24, 4, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x)[0], y)
        loss.backward()
        optimizer.step()
        return loss.item()

    def outputs() -> Tensor:
        with torch.no_grad():
            return model(x)[0]

    return Job(lambda: [step() for _ in range(steps)], outputs)


def pipeline(moved: Callable[[nn.LSTM], nn.Module], **options) -> Pipeline:
    """``moved`` gives what is trained in place of torch's module."""

    def build(small: bool, move: bool) -> Job:
        module = nn.LSTM(6, 8)
        return job(moved(module) if move else module)

    return Pipeline(name="made up", distribution="none", how="moved()", timed="3 steps", build=build, **options)


def ours(module: nn.LSTM, kind: type[lstmcore.LSTM] = lstmcore.LSTM) -> nn.Module:
    """The module, of another class; nothing is drawn for it."""
    module.__class__ = kind
    return module


class Wrong(lstmcore.LSTM):
    """Off by a thousandth: in its output, or only in its gradient."""

    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        if self.where == "output":
            return output * 1.001, state
        return output.detach() + 1.001 * (output - output.detach()), state


def wrong(where: str) -> Callable[[nn.LSTM], nn.Module]:
    def make(module: nn.LSTM) -> nn.Module:
        module.where = where
        return ours(module, Wrong)

    return make


def test_what_agrees_passes():
    verdict = parity.check(pipeline(ours))
    assert (verdict.steps, verdict.gradients) == (6, 4)
    assert 0 < verdict.share < 1
    assert verdict.float64 is not None
    assert 0 < verdict.float64 < parity.FLOAT64
    assert verdict.told.startswith("outputs, losses and 4 gradients of 6 steps; in float64 to ")


def test_float64_can_be_left_out():
    verdict = parity.check(pipeline(ours, float64=False))
    assert verdict.float64 is None
    assert verdict.told == "outputs, losses and 4 gradients of 6 steps"


@pytest.mark.parametrize(("where", "what"), [("output", "outputs before training"), ("gradient", "gradient of param")])
def test_a_thousandth_is_found(where, what):
    with pytest.raises(Mismatch, match=what):
        parity.check(pipeline(wrong(where), float64=False))


def test_a_small_mistake_is_found_in_float64():
    """One of 1e-9, which float32 does not see."""

    def slightly(module: nn.LSTM) -> nn.Module:
        other = ours(module)
        other.register_forward_hook(lambda _, __, result: (result[0] * (1 + 1e-9), result[1]))
        return other

    with pytest.raises(Mismatch, match="in float64"):
        parity.check(pipeline(slightly))


def test_torch_is_not_compared_with_torch():
    with pytest.raises(Mismatch, match="the run moved over called our kernels 0 times and torch's LSTM 8 times"):
        parity.check(pipeline(lambda module: module))


def test_a_backend_that_is_torchs_does_not_count():
    def torchs(module: nn.LSTM) -> nn.Module:
        other = ours(module)
        other.backend = "torch"
        return other

    with pytest.raises(Mismatch, match="our kernels 0 times"):
        parity.check(pipeline(torchs))


def test_what_does_not_train_is_no_comparison():
    untrained = Pipeline(
        name="made up",
        distribution="none",
        how="",
        timed="",
        build=lambda small, moved: Job(list, lambda: torch.ones(1)),
    )
    with pytest.raises(Mismatch, match="nothing was trained: 0 optimizer steps, 0 losses"):
        parity.check(untrained)


def test_a_run_is_repeatable_and_a_nudge_is_small():
    same, again = (run(pipeline(ours), moved=False) for _ in range(2))
    nudged = run(pipeline(ours), moved=False, nudge=0)
    assert same.losses == again.losses
    off = parity.difference(same.outputs[0], nudged.outputs[0])
    assert 0 < off < 1e-6


def test_runs_that_see_different_things_do_not_agree():
    one, other = (run(pipeline(ours), moved=False, times=times) for times in (1, 2))
    with pytest.raises(Mismatch, match="only one of two runs has: gradient of parameter 0 at step 3"):
        list(parity.pairs(one, other))


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_pinned(group):
    """Each package by version, torch as everywhere; so installing needs no other package and no other torch."""
    lines = [line for line in (ROOT / f"tests/libraries/{group}.txt").read_text().splitlines() if line[:1] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", line) for line in lines), lines
    everywhere = re.findall(r"^(?:torch|numba|llvmlite)==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert len(everywhere) == 3
    assert {*everywhere} <= {*lines}


def test_a_library_has_pipelines_and_a_test():
    """The Makefile, the pipelines and the tests name the same libraries."""
    named = {name for group in GROUPS for name in re.search(rf"^{group} := (.+)$", MAKEFILE, re.MULTILINE)[1].split()}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests/libraries").glob("test_*.py")}
    shared = {"__init__", "__main__", "forecasts", "models", "pages", "pipeline", "parity", "table"}
    pipelines = {path.stem for path in (ROOT / "bench/libraries").glob("*.py")} - shared
    assert named == tests == pipelines


def row(name: str, **columns: object) -> Row:
    """A row that nobody has measured."""
    text = dict.fromkeys(("distribution", "commit", "date", "numba", "lstmcore"), "x")
    times = {f"{side}p{share}_ms": 10.0 for side in ("", "peer_") for share in (20, 50, 80)}
    given = {
        "pipeline": name,
        "version": "1.2",
        "torch": "2.13",
        "device": "Made Up",
        "threads": 2,
        "how": "patch(model)",
    }
    given |= {"checked": "3 steps", "share": 0.5, "timed": "an epoch", "pairs": 7}
    return Row(**{**text, **times, **given, **columns})


def test_rows_are_kept_by_pipeline_and_shown(tmp_path):
    path, page = tmp_path / "rows" / "made-up-2t.csv", tmp_path / "libraries.md"
    table.save(path, [row("b"), row("a", float64=1e-15)])
    table.save(path, [row("b", peer_p50_ms=25.0)])
    found = table.read(path)
    assert [(each.pipeline, each.speed, each.float64) for each in found] == [("a", 1.0, 1e-15), ("b", 2.5, None)]

    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_libraries(path.parent, page)
    lines = page.read_text().splitlines()
    assert "Made Up, 2 threads, torch 2.13:" in lines
    assert "| b | 1.2 | `patch(model)` | 3 steps | an epoch: 25 ms, moved over 10 ms | **2.50×** |" in lines
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines


def test_a_page_without_rows_says_so(tmp_path):
    page = tmp_path / "libraries.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.update_libraries(tmp_path / "none", page)
    assert "make bench-libraries" in page.read_text()


@pytest.mark.parametrize("path", sorted(table.FOLDER.glob("*.csv")), ids=lambda path: path.stem)
def test_committed_rows_are_those_on_the_page(path):
    text = (ROOT / "docs/libraries.md").read_text()
    for line in table.lines(table.read(path)):
        assert f"| {' | '.join(line)} |" in text


def test_a_snippet_is_found_by_its_section():
    text = (ROOT / "docs/libraries.md").read_text()
    names = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert {"sb3-contrib", "torchrl", "skorch", "Lightning", "accelerate", "opacus"} <= {*names}
    for name in names:
        for snippet in pages.snippets(name):
            compile(snippet, name, "exec")
    with pytest.raises(KeyError):
        pages.snippets("no library")
