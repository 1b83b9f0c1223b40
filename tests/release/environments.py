"""Virtual environments in which a release is tried: away from the checkout, with exact versions."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"


class Absent(Exception):
    """What an environment needs is not to be had here; the message says what, and why."""


def interpreter(version: str) -> str:
    """The interpreter of this version, "3.10", on the PATH or among pyenv's; raises Absent."""
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places = [shutil.which(name), *sorted(map(str, pyenv.glob(f"{version}.*/bin/{name}")), reverse=True)]
    for place in filter(None, places):  # pyenv puts a word of each version on the PATH, also of those that are not on
        if subprocess.run([place, "-c", ""], capture_output=True, check=False).returncode == 0:
            return place
    raise Absent(f"no {name} here, neither on the PATH nor in {pyenv}".replace(str(Path.home()), "~"))


class Environment:
    """A virtual environment with exactly what ``pins`` say and what these depend on."""

    def __init__(self, folder: Path, python: str, pins: Sequence[str]) -> None:
        self.folder, self.pins = folder, tuple(pins)
        self.python = folder / "venv" / "bin" / "python"
        self._constraints = folder / "pins.txt"
        wanted = "\n".join([f"# {python}", *pins, ""])
        ready = self._constraints.exists() and self._constraints.read_text() == wanted
        if ready and (folder / "ready").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        subprocess.run([interpreter(python), "-m", "venv", folder / "venv"], check=True)
        self._constraints.write_text(wanted)
        try:
            self.install(*pins)
        except subprocess.CalledProcessError as error:
            raise Absent(f"pip install {' '.join(pins)}: {_last_line(error.stderr)}") from error
        (folder / "ready").touch()

    def install(self, *what: str | Path, fresh: bool = False) -> None:
        """Installs requirements or files under the pins, and nothing that contradicts them."""
        # As an environment variable the pins replace constraints of pip's configuration, which may know older versions.
        environment = {**os.environ, "PIP_CONSTRAINT": str(self._constraints)}
        command = [self.python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        command += ["--force-reinstall", "--no-deps"] if fresh else []
        subprocess.run([*command, *what], env=environment, check=True, stderr=subprocess.PIPE, text=True)

    def consistent(self) -> None:
        """Raises CalledProcessError where what is installed does not satisfy what it requires."""
        self.run("-m", "pip", "check")

    def run(self, *arguments: str | Path, cwd: Path | None = None, limit: float = 1800) -> str:
        """What Python prints with these arguments, in an empty folder unless ``cwd`` is another.

        Nothing of the caller's is importable, and the kernels' cache is the environment's own.  Raises
        CalledProcessError, with all that was printed, where it fails.
        """
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["NUMBA_CACHE_DIR"] = str(self.folder / "cache")
        with tempfile.TemporaryDirectory() as empty:
            done = subprocess.run(
                [self.python, *arguments],
                cwd=cwd or empty,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
                check=False,
            )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stdout)
        return done.stdout


def _last_line(text: str) -> str:
    """The line of a failed pip that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["it said nothing"])[-1]
