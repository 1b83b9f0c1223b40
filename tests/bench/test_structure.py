"""The benchmark's rooms: imports go one way, and the one command says what each word does."""

from __future__ import annotations

import ast
import pathlib

import pytest

from bench import cli
from bench.cases import CASES, GROUPS
from bench.experiments import EXPERIMENTS, MAIN

BENCH = pathlib.Path(__file__).parents[2] / "bench"
# Each imports only what is before it; an experiment no other one, a library's pipelines what libraries share.
LAYERS = (
    "cases", "machine", "timing", "rows", "cudnn", "providers", "verify", "costs", "memory", "onnx_peer", "summary",
    "tables", "findings", "measure", "session", "plots", "curves", "page", "libraries", "rounding", "report",
    "gpu.install", "gpu.packing", "gpu.launches", "gpu.model", "gpu.compile", "gpu.environment", "gpu.smoke",
    "gpu.streams", "gpu.kernels", "experiments", "gpu.visit", "compare", "cli",
)  # fmt: skip
FOLDERS = ("experiments", "libraries")
FREE = ("__main__", "conftest", "test_bench")  # nobody imports them


def module(path: pathlib.Path) -> str:
    parts = path.relative_to(BENCH).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {module(path): path for path in BENCH.rglob("*.py") if module(path)}


def imported(path: pathlib.Path) -> set[str]:
    """The modules of the benchmark that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bench":
            base = node.module.removeprefix("bench").lstrip(".")
            found |= {".".join(filter(None, (base, alias.name))) for alias in node.names} & set(SOURCES) or {base}
    return found


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_go_one_way(name):
    layer = next((folder for folder in FOLDERS if name.split(".")[0] == folder), name)
    if layer in FREE or layer == "gpu":
        return
    assert layer in LAYERS, f"{name} has no place among the layers"
    before = LAYERS[: LAYERS.index(layer)]
    for other in imported(SOURCES[name]):
        own = name == "experiments" and other.startswith("experiments")
        if other.split(".")[0] == "libraries":
            own, other = layer == "libraries", "libraries"
        assert own or other in before, f"{name} imports {other}: the arrow goes back"


def test_the_parser_sees_imports():
    assert imported(SOURCES["experiments.designs"]) >= {"cases", "gpu.launches", "rows", "measure"}
    assert imported(SOURCES["experiments"]) >= {"experiments.speed", "experiments.control"}


def test_every_word_has_its_sentence(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    sentences = {name: experiment.what for name, experiment in EXPERIMENTS.items()}
    sentences |= {name: what for name, (what, _) in cli.COMMANDS.items()}
    assert set(sentences) >= {"speed", "after-torch", "control", "flow", "steps", "handoff", "gpu", "kernels", "report"}
    for name, what in sentences.items():
        assert f"{name} {what[:20]}" in told
        with pytest.raises(SystemExit) as done:
            cli.main([name, "--help"])
        assert done.value.code == 0
        own = capsys.readouterr().out
        assert all(column in own for column in EXPERIMENTS[name].details) if name in EXPERIMENTS else own


def test_options_for_what_measures_are_refused_elsewhere(capsys):
    assert cli.main(["--device", "cuda", "report"]) == 2
    assert "report does not take --device" in capsys.readouterr().err
    assert cli.main(["--quick", "speed", "--case", "call-h16", "--list"]) == 0  # before and after the word
    assert "1 of 128 cases" in capsys.readouterr().out


def test_a_device_has_a_main_experiment_and_a_group_one_that_exists():
    assert {device: each[0].name for device, each in MAIN.items()} == {"cpu": "after-torch", "cuda": "speed"}
    assert {group.experiment for group in GROUPS.values()} <= {*EXPERIMENTS, "rounding", "smoke"}
    assert {case.group for case in CASES.values()} == set(GROUPS)
