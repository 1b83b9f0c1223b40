"""Builds the wheel and the sdist, looks inside, and tries both in a clean environment."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from .cells import CELLS, development
from .environments import BUILD, ROOT, Environment

DIST = ROOT / "dist"
SMOKE = Path(__file__).parent / "smoke.py"
FOLDERS = {"lstmcore": "lstmcore", "kernels": "lstmcore/kernels"}  # of the checkout, and where a wheel has them
MADE = ("PKG-INFO", "setup.cfg", "lstmcore.egg-info/")  # in the sdist, by setuptools
UNSHIPPED = (".ci/", ".gitignore")  # in the checkout, and not in the sdist


class Wrong(Exception):
    """Something in a release is not as it should be."""


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def tracked() -> set[str]:
    """The files of the checkout that git knows, and that are there."""
    return {name for name in git("ls-files", "-z").split("\0") if name and (ROOT / name).is_file()}


def export(target: Path) -> None:
    """Copies them: nothing that a build left behind in the checkout can get into another."""
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def build(source: Path, target: Path, kind: str) -> Path:
    """The wheel or the sdist of a source tree; two wheels of the same sources are the same bytes."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct").strip()}
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", target, source]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise Wrong(f"building the {kind} failed:\n{done.stdout}")
    if "Warning" in done.stdout:
        raise Wrong(f"building the {kind} warns:\n{done.stdout}")
    (path,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return path


def _compare(what: str, got: set[str], expected: set[str]) -> None:
    missing, surplus = sorted(expected - got), sorted(got - expected)
    if missing or surplus:
        raise Wrong(f"{what}: missing {missing or 'nothing'}, too many {surplus or 'none'}")


def look_into_wheel(wheel: Path) -> int:
    """Raises Wrong unless it has every source of the package and no other file; their number."""
    expected = {"lstmcore/py.typed"}
    for folder, place in FOLDERS.items():
        own = [name for name in tracked() if name.startswith(f"{folder}/") and name.endswith((".py", ".csv"))]
        expected |= {place + name.removeprefix(folder) for name in own}
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    _compare(wheel.name, names - about, expected)
    if not any(name.endswith("/LICENSE") for name in about):
        raise Wrong(f"{wheel.name} has no license")
    return len(names)


def unpack(sdist: Path, target: Path) -> Path:
    """Its source tree."""
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    (source,) = target.iterdir()
    return source


def look_into_sdist(source: Path) -> int:
    """Raises Wrong unless an unpacked sdist has what the checkout has; the number of its files."""
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    own = {name for name in names if not name.startswith(MADE)}
    _compare("the sdist", own, {name for name in tracked() if not name.startswith(UNSHIPPED)})
    return len(names)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build_all() -> tuple[Path, Path]:
    """The wheel and the sdist in ``dist/``, checked."""
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        export(place / "checkout")
        sdist = build(place / "checkout", DIST, "sdist")
        source = unpack(sdist, place / "unpacked")
        in_sdist = look_into_sdist(source)
        wheel = build(source, DIST, "wheel")
        twin = build(place / "checkout", place / "twin", "wheel")
        if _digest(wheel) != _digest(twin):
            raise Wrong("the sdist and the checkout build different wheels")
    in_wheel = look_into_wheel(wheel)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], check=True)
    print(f"{sdist.name}: {in_sdist} files, as in the checkout")
    print(f"{wheel.name}: {in_wheel} files; the sdist builds the same bytes")
    print(f"sha256 of the wheel: {_digest(wheel)}")
    return wheel, sdist


def smoke(environment: Environment) -> str:
    """Tries what is installed; the line that the smoke test ends with.  Raises CalledProcessError."""
    environment.consistent()
    line = environment.run("-I", SMOKE).strip().splitlines()[-1]
    for command in (["--version"], ["info", "--markdown"], ["check"]):
        environment.run("-I", "-m", "lstmcore", *command)
    return line


def run() -> int:
    wheel, sdist = build_all()
    (cell,) = (cell for cell in CELLS if cell.name == "pinned")
    environment = Environment(BUILD / "release", cell.python, (*cell.pins, *development("setuptools")))
    for path in (wheel, sdist):
        environment.install(path)
        environment.install(path, fresh=True)
        print(f"{path.name}, installed: {smoke(environment)}")
    return 0
