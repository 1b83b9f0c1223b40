"""Every command and every snippet of the README works; every link into the tree leads somewhere."""

from __future__ import annotations

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


COMMANDS = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.strip()]
INLINE = re.findall(r"`((?:make|python) [^`]+)`", TEXT)


def harmless(command: str) -> list[str] | None:
    """What to run instead: the command itself where it is quick and writes nothing, else one that checks its arguments.

    None for a form that this test does not know, which fails: extend it with the README.
    """
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "lstmcore"]:
        # test_cli.py runs the check, flow/test_demo.py the demonstration
        return [sys.executable, *words[1:], *(["--help"] if {"check", "flow"} & {*words} else [])]
    if words[:2] == ["python", "-m"] and words[2] == "bench":
        other = {"report", "compare", "gpu", "kernels"} & {*words}
        last = [] if "--list" in words else ["--help"] if other else ["--list"]
        return [sys.executable, *words[1:], *last]
    if words[0] == "python" and words[1].startswith("examples/"):
        return [sys.executable, *words[1:], *([] if "--help" in words else ["--help"])]
    if words[0] == "pytest":
        return [sys.executable, "-m", "pytest", "--collect-only", "-q", *words[1:]]
    if words[0] == "make":
        return ["make", "--dry-run", *words[1:]]
    if words == ["pip", "install", "."]:  # the wheel's tests build it; here that the tree is installable at all
        return [sys.executable, "-c", "import tomllib; tomllib.load(open('pyproject.toml', 'rb'))['project']['name']"]
    return None


@pytest.mark.parametrize("command", sorted({*COMMANDS, *INLINE}))
def test_command(command, tmp_path):
    instead = harmless(command)
    assert instead is not None, f"a form of command that is not tested: {command}"
    if instead[0] == "make" and shutil.which("make") is None:
        pytest.skip("make is not installed on this machine")
    if "tomllib" in instead[-1] and sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    done = subprocess.run(instead, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, f"{shlex.join(instead)}\n{done.stdout}\n{done.stderr}"


def test_there_is_something_to_test():
    assert {"make bench", "make test"} <= set(COMMANDS)
    assert blocks("python")


def test_snippets(capsys, tmp_path, monkeypatch):
    """In order, in one namespace, as a reader would."""
    monkeypatch.chdir(tmp_path)  # they write files
    namespace: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "backend" in printed
    assert "The gradient vanishes: from lag" in printed
    assert namespace["output"].shape == (1000, 32, 256)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT))))
def test_link(target):
    assert (ROOT / target).exists()
