"""What waits for the import of another library: called once it is there, in the way of nobody."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from lstmcore import importing


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Makes a library that can be imported, of this source; forgotten when the test ends."""
    name = "library_of_a_test"

    def make(source: str = "loaded = True") -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
        (tmp_path / name / "inner.py").write_text("table = {}")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return name

    waiting = dict(importing._finder.waiting)
    yield make
    for each in (name, f"{name}.inner"):
        sys.modules.pop(each, None)
    importing._finder.waiting = waiting


def test_after_the_import(library):
    """And once: not while others only ask whether it is installed."""
    name, calls = library(), []
    importing.after(name, lambda: calls.append(sys.modules[name].loaded))
    assert importing._finder in sys.meta_path
    assert importlib.util.find_spec(name) is not None
    assert not calls
    importlib.import_module(name)
    importlib.import_module(name)
    assert calls == [True]
    assert name not in importing._finder.waiting


def test_after_the_import_of_a_module_inside(library):
    name, calls = f"{library()}.inner", []
    importing.after(name, lambda: calls.append(sys.modules[name].table))
    importlib.import_module(name.split(".")[0])
    assert not calls
    importlib.import_module(name)
    assert calls == [{}]


def test_at_once_where_it_is_there():
    calls = []
    importing.after("torch", lambda: calls.append(1))
    assert calls == [1]


def test_the_finder_goes_when_nothing_is_waited_for(library, monkeypatch):
    finder = importing._Finder()
    monkeypatch.setattr(importing, "_finder", finder)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    name = library()
    importing.after(name, list)
    importing.after(f"{name}.inner", list)
    importlib.import_module(name)
    assert finder in sys.meta_path
    importlib.import_module(f"{name}.inner")
    assert finder not in sys.meta_path


def test_two_of_them(library, monkeypatch):
    """As where lstmcore has been imported twice: each asks those behind it."""
    name, calls = library(), []
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for each in ("first", "second"):
        finder = importing._Finder()
        finder.waiting[name] = lambda each=each: calls.append(each)
        sys.meta_path.insert(0, finder)
    importlib.import_module(name)
    assert sorted(calls) == ["first", "second"]


def test_what_is_not_installed(library):
    library()
    importing.after("library_that_nobody_has", lambda: pytest.fail("it cannot have been imported"))
    assert importlib.util.find_spec("library_that_nobody_has") is None
    with pytest.raises(ModuleNotFoundError, match="No module named 'library_that_nobody_has'"):
        importlib.import_module("library_that_nobody_has")


def test_an_import_that_fails(library):
    """The error is the library's, and the next attempt is as good as the first."""
    name, calls = library("import nothing_of_this_name"), []
    importing.after(name, lambda: calls.append(1))
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
            importlib.import_module(name)
    assert not calls
    assert name in importing._finder.waiting


def test_a_failure_of_ours_is_a_warning(library):
    name = library()
    importing.after(name, lambda: {}["an entry that it had before"])
    with pytest.warns(UserWarning, match=f"does not work with this version of {name}: KeyError.*had before"):
        assert importlib.import_module(name).loaded


def test_nothing_is_imported_for_it(tmp_path):
    """``import lstmcore`` imports neither torch's counter nor opacus."""
    program = "import sys, lstmcore; print(*({'torch.utils.flop_counter', 'opacus'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip()
