"""Every command, snippet and example of a docstring that the pages show works; links into the tree lead somewhere.

Anchors, and links that the API pages make, are checked where those are built: ``make docs``.
"""

from __future__ import annotations

import doctest
import importlib
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import bench.cli
import lstmcore
import lstmcore.cli

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *ROOT.glob("docs/**/*.md"),
]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in sorted(PAGES)}
ELSEWHERE = ("docs/extending.md", "docs/libraries.md")  # run by test_extending.py, by tests/libraries
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
COMMANDS = {
    line.split("#")[0].strip()
    for text in TEXTS.values()
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip()
} | {command for text in TEXTS.values() for command in re.findall(r"(?<!`)`((?:make|python) [^`\n]+)`", text)}
MAINS = {"bench": bench.cli.main, "lstmcore": lstmcore.cli.main}
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(ROOT.glob("lstmcore/**/*.py"))
    if ">>> " in path.read_text()
]


def harmless(command: str) -> list[str] | None:
    """What to run instead: the command itself where it is quick and writes nothing, else one that checks its arguments.

    None for a form that this test does not know, which fails: extend it with the pages.
    """
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "lstmcore"]:
        # test_cli.py runs the check, test_tune.py tunes, the demonstration's tests run that; prewarm wants to know what
        return [sys.executable, *words[1:], *(["--help"] if {"check", "flow", "prewarm", "tune"} & {*words} else [])]
    if words[:3] == ["python", "-m", "bench"]:
        last = ["--help"] if {"report", "compare", "gpu", "kernels", "scaling", "rounding"} & {*words} else ["--list"]
        return [sys.executable, *words[1:], *([] if "--list" in words else last)]
    if words[0] == "python" and words[1].startswith("examples/"):
        return [sys.executable, *words[1:], *([] if "--help" in words else ["--help"])]
    if words[0] == "torchrun":  # tests/pipelines runs it
        return harmless(shlex.join(["python", *words[words.index("--nproc-per-node") + 2 :]]))
    if words[0] == "pytest":
        return [sys.executable, "-m", "pytest", "--collect-only", "-q", *words[1:]]
    if words[0] == "make":
        return ["make", "--dry-run", *words[1:]]
    if words[:3] == ["pip", "install", "-e"]:  # the wheel's tests build it; here that there is something to install
        extras = [words[3].removeprefix(".[").removesuffix("]")] if words[3] != "." else []
        project = "tomllib.load(open('pyproject.toml', 'rb'))['project']"
        look = f"project = {project}; project['name'], [project['optional-dependencies'][extra] for extra in {extras}]"
        return [sys.executable, "-c", f"import tomllib; {look}"]
    return None


def status_here(main: Callable[[list[str]], int], arguments: list[str]) -> int | str | None:
    """The status of a command that runs in this process: in another, it would cost an import of torch."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


STARTED = ("pytest ", "python examples/", "torchrun ")  # in processes of their own
BY_COST = [
    pytest.param(command, marks=[pytest.mark.slow] * command.startswith(STARTED)) for command in sorted(COMMANDS)
]


@pytest.mark.parametrize("command", BY_COST)
def test_command(command, threads, monkeypatch, capsys):
    instead = harmless(command)
    assert instead is not None, f"a form of command that is not tested: {command}"
    if instead[0] == "make" and shutil.which("make") is None:
        pytest.skip("make is not installed on this machine")
    if "tomllib" in instead[-1] and sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    monkeypatch.chdir(ROOT)
    if instead[1:2] == ["-m"] and instead[2] in MAINS:
        done = status_here(MAINS[instead[2]], instead[3:])
        assert not done, "\n".join([shlex.join(instead), *capsys.readouterr()])
    else:
        done = subprocess.run(instead, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{shlex.join(instead)}\n{done.stdout}\n{done.stderr}"


def test_there_is_something_to_test():
    assert {"make bench", "make test"} <= COMMANDS
    assert "lstmcore" in WITH_EXAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in TEXTS if "```python" in TEXTS[page] and page not in ELSEWHERE])
def test_snippets(page, tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would."""
    monkeypatch.chdir(tmp_path)  # they write files
    monkeypatch.syspath_prepend(tmp_path)  # and import them
    examples = list(Sybil(parsers=[PythonCodeBlockParser()], path=str(ROOT)).parse(ROOT / page).examples())
    assert len(examples) >= TEXTS[page].count("```python")
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_of_docstrings(module):
    found = doctest.testmod(importlib.import_module(module), extraglobs={"torch": torch, "lstmcore": lstmcore})
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if LINK.search(text)])
def test_links(page):
    folder = (ROOT / page).parent
    missing = [target for target in LINK.findall(TEXTS[page]) if not (folder / target).exists()]
    assert not missing
