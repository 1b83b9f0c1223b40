"""The walks of docs/extending.md: made in a copy of the repository, counted, and run."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
WALKS = (ROOT / "docs" / "extending.md").read_text().split("\n## ")[1:]
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def change(path: pathlib.Path, hunks: str) -> None:
    """Applies the hunks of a diff, parted by lines of @@: each to the first place after the one before that it fits."""
    text, done = path.read_text(), 0
    for hunk in hunks.split("@@\n"):
        lines = [line if line.strip() else " \n" for line in hunk.splitlines(keepends=True)]
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert old, f"a hunk that fits anywhere in {path.name}"
        at = text.index(old, done)
        text, done = text[:at] + new + text[at + len(old) :], at + len(new)
    path.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS, ids=[walk.split(":")[0] for walk in WALKS])
def test_walk(walk, tmp_path):
    for room in ("lstmcore", "kernels", "bench"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (tmp_path / "lstmcore" / "kernels").symlink_to(tmp_path / "kernels")  # where an installation has them
    touched, snippets = set(), []
    for language, place, text in FENCE.findall(walk):
        if not place:
            snippets.append(text)
            continue
        assert (tmp_path / place).exists() == (language == "diff"), place
        touched.add(place)
        if language == "diff":
            change(tmp_path / place, text)
        else:
            (tmp_path / place).write_text(text)
    heading = walk.splitlines()[0]
    assert heading.endswith(f": {len(touched)} file{'s' * (len(touched) > 1)}"), sorted(touched)
    code = "\n".join([*snippets, f"import lstmcore; assert lstmcore.__file__.startswith({str(tmp_path)!r})"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
