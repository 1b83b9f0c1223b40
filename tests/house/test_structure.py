"""The rules of the house: which module may import which, what an import costs, what a wheel holds."""

from __future__ import annotations

import ast
import graphlib
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Each imports only what is before it.
LAYERS = (
    "kernels", "frames", "stock", "tables", "init", "importing", "recording", "routing", "scripting", "quantization",
    "recompute", "guards", "checks", "backends", "direct", "ops", "flops", "onnx", "transforms", "autograd", "stack",
    "functional", "module", "explaining", "models", "opacus", "watching", "engines", "stream", "truncation", "flow",
    "cli",
)  # fmt: skip
PACKAGES = ("backends", "cli", "flow", "models")  # whose files may know each other
FREE = ("_version",)  # holds a constant; anyone may
HOUSE = {"lstmcore", "kernels", "bench", "tests", "examples", *(path.stem for path in (ROOT / "examples").iterdir())}
TABLE = "lstmcore/backends/measured/a-made-up-device.csv"  # of timings, which a wheel has as well
SOURCES = {path: path.relative_to(ROOT) for name in ("lstmcore", "kernels") for path in (ROOT / name).rglob("*.py")}


def package_of(path: pathlib.Path) -> list[str]:
    """The package that relative imports in this file start from."""
    parts = SOURCES[path].parts[:-1]
    return ["lstmcore", *parts] if parts[0] == "kernels" else list(parts)


def imported(path: pathlib.Path) -> set[str]:
    """Every module of this project that a file names: by an import, anywhere in it, or in a string like an import's."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package_of(path)[: len(package_of(path)) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return {name for name in found if name.split(".")[0] in HOUSE}


def owner(module: str) -> str:
    """The layer that an imported name belongs to: 'kernels' for lstmcore.kernels.cpu.jit, '' for the package itself."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer):
    paths = [p for p, r in SOURCES.items() if layer in (r.parts[0], *r.with_suffix("").parts[1:2])]
    assert paths, f"there is no {layer}"
    allowed = (*LAYERS[: LAYERS.index(layer) + (layer in PACKAGES)], *FREE)
    for path in paths:
        names = imported(path)
        assert all(name.split(".")[0] == "lstmcore" for name in names), f"{SOURCES[path]} imports {names}"
        for name in names - {"lstmcore"}:
            if layer == "kernels":
                assert owner(name) == "kernels", f"{SOURCES[path]} imports {name}: kernels know nothing of lstmcore"
            else:
                assert owner(name) in allowed, f"{SOURCES[path]} imports {name}: the arrow goes back"


def knows(paths: list[pathlib.Path]) -> dict[str, set[str]]:
    """By the name of each of these modules: which others of them it imports, at its top or later."""
    names = {".".join([*package_of(path), path.stem]): path for path in paths if path.stem != "__init__"}
    return {name: imported(path) & (names.keys() - {name}) for name, path in names.items()}


@pytest.mark.parametrize("room", ["kernels", "flow", "models", "cli"])
def test_no_module_waits_for_itself(room):
    """Inside of a package, too, imports go one way: none comes back to where it started, not even one in a function."""
    modules = knows([path for path, relative in SOURCES.items() if room in relative.parts[:-1]])
    assert len(modules) > 3
    assert any(modules.values())
    graphlib.TopologicalSorter(modules).prepare()  # CycleError names the circle


def test_a_circle_is_seen(tmp_path, monkeypatch):
    for name, line in (("a", "from .b import f"), ("b", "def f():\n    from . import a")):
        path = tmp_path / f"{name}.py"
        path.write_text(line)
        monkeypatch.setitem(SOURCES, path, pathlib.PurePath("kernels", f"{name}.py"))
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(knows([tmp_path / "a.py", tmp_path / "b.py"])).prepare()


@pytest.mark.parametrize(("room", "stranger"), [("cpu", "gpu"), ("gpu", "cpu")])
def test_kernels_of_one_kind_do_not_know_the_other(room, stranger):
    paths = [path for path, relative in SOURCES.items() if relative.parts[:2] == ("kernels", room)]
    assert len(paths) > 1
    for path in paths:
        for name in imported(path):
            assert name.split(".")[2:3] != [stranger], f"{SOURCES[path]} imports {name}"


def test_what_all_backends_share_knows_none():
    for path, relative in SOURCES.items():
        if relative.parts[0] == "kernels" and len(relative.parts) == 2:
            for name in imported(path):
                assert name.split(".")[2:3] not in (["cpu"], ["gpu"]), f"{relative} imports {name}"


@pytest.mark.parametrize(
    "file",
    ["backends/choice", "autograd", "checks", "explaining", "functional", "ops", "recording", "stack", "transforms"],
)
def test_only_the_registry_knows_backends_by_name(file):
    """A new backend is a module and an entry there.  (Sentences for people may name one.)"""
    for node in ast.walk(ast.parse((ROOT / "lstmcore" / f"{file}.py").read_text())):
        if isinstance(node, ast.Constant):
            assert node.value not in ("triton", "numba", "torch", "reference"), f"{file}, line {node.lineno}"


def test_gates_are_counted_in_one_place():
    """Four of them, in ``Layer``: nothing else takes 4H apart."""
    for path, relative in SOURCES.items():
        if relative.parts[0] == "lstmcore":
            text = ast.unparse(ast.parse(path.read_text()))
            assert "// 4" not in text, relative


def test_the_parser_sees_an_arrow_back(tmp_path, monkeypatch):
    """The test above can fail: in every form of an import."""
    for line in (
        "from lstmcore import module",
        "import lstmcore.module",
        "from . import module",
        "from .module import LSTM",
        "from gradient_flow import module",
    ):
        path = tmp_path / "backends.py"
        path.write_text(f"def f():\n    {line}\n")
        monkeypatch.setitem(SOURCES, path, pathlib.PurePath("lstmcore", "backends.py"))
        assert "module" in {owner(name) for name in imported(path)}, line


def imports_of_tests(path: pathlib.Path) -> list[str]:
    """The test files, and conftests, that a file names in an import."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return sorted({part for name in names for part in name.split(".") if re.fullmatch(r"test_\w+|conftest", part)})


def test_no_test_imports_a_test():
    """What several share is in tests/support, so that a file can be changed, moved or left out by itself."""
    paths = list((ROOT / "tests").rglob("*.py"))
    assert len(paths) > 50
    for path in paths:
        assert not imports_of_tests(path), path


@pytest.mark.parametrize(
    "line",
    ["from . import test_x", "from .test_x import f", "from tests.cpu.test_x import f", "import tests.cpu.test_x"],
)
def test_an_import_of_a_test_is_seen(tmp_path, line):
    path = tmp_path / "test_y.py"
    path.write_text(f"def test_f():\n    {line}\n")
    assert imports_of_tests(path) == ["test_x"]


def test_no_environment_variables_of_our_own():
    """Behaviour is chosen by arguments.  Standard variables that say where a cache goes may be read.

    A report of a fault shows those of others, which one place lists, and nothing else depends on what it found.
    """
    allowed, lists_others = {"XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"}, pathlib.PurePath("lstmcore/cli/facts.py")
    assert SOURCES
    for path, relative in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, (ast.Call, ast.Subscript, ast.Compare)) else ""
            if relative == lists_others and text == "os.environ.items()":
                continue
            if re.match(r"(os\.)?(environ\b|getenv\()", text):
                named = set(re.findall(r"'(\w+)'", text))
                assert named, f"{relative}: {text} reads a variable that cannot be told from here"
                assert named <= allowed, f"{relative}: {text}"
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"LSTMCORE_\w+", node.value), f"{relative}: {node.value}"


def python(program: str, cwd: pathlib.Path | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=cwd)


def test_import_loads_no_compiler(tmp_path):
    program = "import sys, torch; before = set(sys.modules); import lstmcore; print(*set(sys.modules) - before)"
    done = python(program, tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "lstmcore.module" in loaded
    assert not {name.split(".")[0] for name in loaded} & {"numba", "llvmlite", "triton", "matplotlib", "rich"}
    assert "lstmcore.kernels.cpu.backend" not in loaded


@pytest.mark.slow
def test_import_adds_little_to_torchs(tmp_path):
    """Processor time, not the clock's, and the least of several: what else the machine does is not measured."""
    program = "import time, torch; start = time.process_time(); import lstmcore; print(time.process_time() - start)"
    times = [float(python(program, tmp_path).stdout) for _ in range(3)]
    assert min(times) < 0.3


def test_top_level_kernels_says_what_to_do():
    done = python("import kernels", ROOT)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "pip install -e ." in done.stderr
    assert "lstmcore.kernels" in done.stderr


def test_no_directory_that_would_hide_the_kernels():
    assert not (ROOT / "lstmcore" / "kernels").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The wheel, built offline from a copy, so that nothing is left in the tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lstmcore", "kernels", "tests", "bench", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / TABLE).parent.mkdir(exist_ok=True)
    (source / TABLE).touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", target, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return path


@pytest.mark.xdist_group("wheel")  # built once
@pytest.mark.slow
def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lstmcore"}
    assert len(tops) == 2
    expected = {f"lstmcore/{path.name}" for path in (ROOT / "lstmcore").glob("*.py")} | {"lstmcore/py.typed"}
    for package in PACKAGES:
        expected |= {f"lstmcore/{package}/{path.name}" for path in (ROOT / "lstmcore" / package).glob("*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / TABLE).parent.glob("*.csv")} | {TABLE}
    expected |= {f"lstmcore/{SOURCES[path]}" for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.startswith("lstmcore/")} == expected
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.xdist_group("wheel")  # built once
@pytest.mark.slow
def test_wheel_works_where_it_is_unpacked(wheel, tmp_path):
    """Without the checkout: the package imports from the wheel's own files and computes."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__ + getattr(f, "__name__", "").lower()]
sys.path.insert(0, {str(tmp_path)!r})
import torch, lstmcore, lstmcore.kernels.contract as contract
assert lstmcore.__file__.startswith({str(tmp_path)!r}), lstmcore.__file__
assert contract.__file__.startswith({str(tmp_path)!r}), contract.__file__
lstmcore.LSTM(3, 4, backend="reference")(torch.randn(5, 2, 3))[0].sum().backward()
print(lstmcore.__version__)
"""
    done = python(program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in wheel.name


@pytest.mark.xdist_group("wheel")  # built once
@pytest.mark.slow
def test_wheel_says_where_the_demonstration_is(wheel, tmp_path):
    """It needs the source: one sentence instead of a traceback."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    command = [sys.executable, "-m", "lstmcore", "flow", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert not done.stdout
    assert re.fullmatch(r"lstmcore flow: the demonstration is not installed .*examples/gradient_flow.*\n", done.stderr)
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".dist-info")} == {"lstmcore"}


def test_every_public_name_is_there():
    import lstmcore

    assert set(lstmcore.__all__) >= {"LSTM", "LSTMCell", "lstm", "explain", "__version__", "record_gradient_flow"}
    for name in lstmcore.__all__:
        assert getattr(lstmcore, name) is not None
