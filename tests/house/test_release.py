"""What a release says of itself agrees, and the matrix tries the bounds that are promised."""

import pathlib
import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from lstmcore import __version__

from ..release import dist, environments
from ..release.cells import CELLS, TOOLS

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
PINS = {cell.name: {name: Version(number) for name, number in (pin.split("==") for pin in cell.pins)} for cell in CELLS}


def bounds() -> dict[str, Version]:
    """The lower bounds in pyproject.toml, by package."""
    named = re.findall(r'"((?:torch|numba|triton)>=[^"]+)"', PROJECT)
    return {req.name: Version(next(iter(req.specifier)).version) for req in map(Requirement, named)}


def test_the_version_is_one():
    cited = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\n" in cited
    latest = re.search(
        r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert latest is not None
    assert latest[1] == __version__
    released = re.search(r"^date-released: (\S+)$", cited, re.MULTILINE)
    assert (released[1] if released else "unreleased") == latest[2]


def test_the_oldest_cell_has_the_lower_bounds():
    assert set(bounds()) == {"torch", "numba", "triton"}
    for name, bound in bounds().items():
        assert PINS["oldest"][name].release[:2] == bound.release[:2], name
    (oldest,) = (cell for cell in CELLS if cell.name == "oldest")
    assert f'requires-python = ">={oldest.python}"' in PROJECT


def test_the_newest_cell_has_nothing_older_than_another():
    for name, newest in PINS["newest"].items():
        assert newest.public == max(pins[name] for pins in PINS.values() if name in pins).public, name


def test_every_cell_pins_exactly():
    for cell in CELLS:
        for pin in (*cell.pins, *TOOLS):
            assert re.fullmatch(r"[a-z-]+==\d[\w.+]*", pin), pin
        assert {"torch", "numba", "numpy"} <= set(PINS[cell.name])
    page = (ROOT / "docs" / "releasing.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == [cell.name for cell in CELLS]


def test_a_python_that_is_not_here_is_absent(tmp_path):
    with pytest.raises(environments.Absent, match=r"no python3\.99 here"):
        environments.Environment(tmp_path / "cell", "3.99", ())
    assert not (tmp_path / "cell" / "ready").exists()


def test_a_wheel_with_a_file_too_many_is_seen():
    with pytest.raises(dist.Wrong, match=r"missing \['lstmcore/py.typed'\], too many \['tests/a.py'\]"):
        dist._compare("a wheel", {"lstmcore/a.py", "tests/a.py"}, {"lstmcore/a.py", "lstmcore/py.typed"})
    dist._compare("a wheel", {"lstmcore/a.py"}, {"lstmcore/a.py"})
