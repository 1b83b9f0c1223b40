"""The JIT cache: wherever it is, whatever is in it, the first call works; damaged files are replaced."""

from __future__ import annotations

import hashlib
import os
import pathlib
import subprocess
import sys
import types

import pytest
from lstmcore.kernels.cpu import jit

pytestmark = pytest.mark.xdist_group("cache")  # filled once, for all

LIMIT = 180.0  # seconds for one process that compiles
# Four kernels, of a second together, which stand for the dozen of an LSTM: what they are is all the same to the cache.
PROGRAM = """
import numpy as np
from lstmcore.kernels.cpu import jit
from lstmcore.kernels.cpu.memory import load_int, store_int

@jit.inline
def doubled(x):
    return 2 * x

def made(factor):
    @jit.kernel(f"times {factor}")
    def multiply(address):
        store_int(address, factor * doubled(load_int(address)))

    return multiply

value = np.ones(1, np.int64)
for factor in (3, 5, 7, 11):
    made(factor)(value.ctypes.data)
print(value[0])
print(jit.cache_directory())
"""
PRODUCT = str(6 * 10 * 14 * 22)


def environment(**changes: str | None) -> dict[str, str]:
    """This process's, with ``changes``; None removes a name."""
    merged = {**os.environ, "XDG_CACHE_HOME": None, "NUMBA_CACHE_DIR": None, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def start(cwd: pathlib.Path, **changes: str | None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment(**changes),
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """(the result, the cache directory)"""
    try:
        output, errors = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    result, directory = output.split()
    return result, directory


def call(cwd: pathlib.Path, **changes: str | None) -> tuple[str, str]:
    return finish(start(cwd, **changes))


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def warm(tmp_path_factory) -> pathlib.Path:
    """A filled cache directory."""
    directory = tmp_path_factory.mktemp("cache")
    result, used = call(directory, NUMBA_CACHE_DIR=str(directory))
    assert result == PRODUCT
    assert pathlib.Path(used).is_relative_to(directory), "NUMBA_CACHE_DIR is not honoured"
    assert len(contents(directory)) == 4, "not everything was cached"
    return directory


def times(directory: pathlib.Path) -> dict[pathlib.Path, int]:
    return {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_second_process_compiles_nothing(warm):
    before = times(warm)
    assert call(warm, NUMBA_CACHE_DIR=str(warm))[0] == PRODUCT
    assert times(warm) == before


def damage_truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damage_garbage(content: bytes) -> bytes:
    return bytes(255 - b for b in content[:4096])


def damage_one_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def damage_empty(content: bytes) -> bytes:
    return b""


@pytest.mark.slow
def test_damaged_files_are_replaced(warm, tmp_path):
    """Every kind of damage at once, one a file."""
    kinds = [damage_truncate, damage_garbage, damage_one_bit, damage_empty]
    for damage, (name, content) in zip(kinds, contents(warm).items(), strict=True):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(damage(content))
    damaged = contents(tmp_path)
    assert call(tmp_path, NUMBA_CACHE_DIR=str(tmp_path))[0] == PRODUCT
    after = contents(tmp_path)
    assert after.keys() == damaged.keys()
    assert all(after[name] != damaged[name] for name in damaged), "a damaged file stayed"


@pytest.mark.slow
def test_a_directory_in_the_place_of_a_file(warm, tmp_path):
    for name in contents(warm):
        (tmp_path / name).mkdir(parents=True)
    assert call(tmp_path, NUMBA_CACHE_DIR=str(tmp_path))[0] == PRODUCT
    assert not contents(tmp_path), "left-overs of a write that failed"


@pytest.mark.slow
def test_read_only_directory(tmp_path):
    """A place where nothing can be made, for root too: under a file."""
    (tmp_path / "file").write_text("not a directory")
    assert call(tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "file" / "cache"))[0] == PRODUCT


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root writes to read-only directories")
def test_read_only_permissions(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert call(pathlib.Path.cwd(), NUMBA_CACHE_DIR=str(tmp_path))[0] == PRODUCT
        assert not contents(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.slow
def test_two_processes_compile_at_once(warm, tmp_path):
    processes = [start(tmp_path, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    assert [finish(process)[0] for process in processes] == [PRODUCT] * 2
    assert contents(tmp_path).keys() == contents(warm).keys(), "files missing, or temporary ones left"
    before = contents(tmp_path)
    assert call(tmp_path, NUMBA_CACHE_DIR=str(tmp_path))[0] == PRODUCT
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("home", [None, "/dev/null/home"], ids=["unset", "unwritable"])
def test_home(tmp_path, home):
    """No HOME, or one that cannot be written to: it runs (XDG_CACHE_HOME keeps the first out of the user's own)."""
    changes = {"HOME": home} | ({"XDG_CACHE_HOME": str(tmp_path)} if home is None else {})
    result, directory = call(tmp_path, **changes)
    assert result == PRODUCT
    if home is None:
        assert pathlib.Path(directory).is_relative_to(tmp_path), "XDG_CACHE_HOME is not honoured"


@pytest.mark.slow
def test_home_unset_has_a_place():
    program = "from lstmcore.kernels.cpu import jit; print(jit.cache_directory())"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(HOME=None), capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert pathlib.Path(done.stdout.strip()).is_absolute()


def test_import_never_touches_the_cache(tmp_path):
    """Importing the package writes nothing, and works where nothing can be written."""
    done = subprocess.run(
        [sys.executable, "-c", "import lstmcore"],
        env=environment(NUMBA_CACHE_DIR=str(tmp_path / "cache"), HOME="/dev/null/home"),
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "cache").exists()


DTYPES_PROGRAM = """
import sys, torch, lstmcore
for name in sys.argv[1:]:
    dtype = getattr(torch, name)
    torch.manual_seed(0)
    module = lstmcore.LSTM(5, 19, dtype=dtype, backend="numba")
    x = torch.randn(6, 4, 5, dtype=dtype)
    outputs = []
    for backend in ("numba", "reference"):
        module.backend = backend
        output, (_, c_n) = module(x)
        grads = torch.autograd.grad(output.square().sum() + c_n.sum(), module.parameters())
        outputs.append(torch.cat([t.detach().flatten() for t in (output, *grads)]))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_kernels_cached_by_different_processes_do_not_meet(tmp_path):
    """Each dtype is compiled by a process of its own; a third loads both, and neither runs the other's functions."""
    kept = []
    for names in (["float32"], ["float64"], ["float32", "float64"], ["float64", "float32"]):
        subprocess.run(
            [sys.executable, "-c", DTYPES_PROGRAM, *names],
            env=environment(NUMBA_CACHE_DIR=str(tmp_path)),
            cwd=tmp_path,
            check=True,
            timeout=LIMIT,
        )
        kept.append(times(tmp_path))
    assert len(kept[0]) < len(kept[1])
    assert kept[1] == kept[2] == kept[3], "what was kept was compiled again"


@pytest.mark.slow
def test_the_first_compilation_says_so(tmp_path):
    """On stderr, in one line: what it is, where it is kept, how to do it ahead; and not where it is kept already."""
    code = """
import os, sys
from lstmcore.kernels.cpu.jit import kernel
if len(sys.argv) > 1: sys.stderr.close()
for key in ("one", "two"):
    @kernel(key)
    def nothing(address):
        pass
"""

    def said(*arguments: str) -> list[str]:
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / (arguments or ("kept",))[0])}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stderr.splitlines()

    (line,) = said()
    assert str(tmp_path / "kept") in line
    assert "python -m lstmcore prewarm" in line
    assert said() == []
    assert said("closed") == []


def cached(path: pathlib.Path, payload: bytes) -> pathlib.Path:
    """A file as the cache writes them."""
    path.write_bytes(hashlib.sha256(payload).digest() + payload)
    return path


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="without users' numbers every file is trusted")
@pytest.mark.parametrize(
    ("owner", "mode", "trusted"),
    [(0, 0o600, True), (7, 0o644, True), (7, 0o664, True), (7, 0o666, False), (0, 0o602, False), (8, 0o600, False)],
)
def test_a_file_that_others_can_have_written_is_not_executed(owner, mode, trusted, tmp_path, monkeypatch):
    """Whoever can write a file of the cache can run code as who reads it."""
    path = cached(tmp_path / "kernel.bin", b"machine code")
    monkeypatch.setattr(os, "getuid", lambda: 7)
    monkeypatch.setattr(os, "fstat", lambda number: types.SimpleNamespace(st_uid=owner, st_mode=0o100000 | mode))
    assert jit._trusted_payload(path) == (b"machine code" if trusted else None)


def test_the_file_that_was_looked_at_is_the_one_that_is_read(tmp_path, monkeypatch):
    path, other = cached(tmp_path / "kernel.bin", b"ours"), cached(tmp_path / "other", b"theirs")
    fstat = os.fstat

    def looked_at(number: int) -> os.stat_result:
        if other.exists():
            os.replace(other, path)
        return fstat(number)

    monkeypatch.setattr(os, "fstat", looked_at)
    assert jit._trusted_payload(path) == b"ours"
    assert jit._trusted_payload(path) == b"theirs"
