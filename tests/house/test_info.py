"""``python -m lstmcore info``: what a report of a fault needs, nothing private, and it does not fail itself."""

import getpass
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
from lstmcore.kernels.cpu import jit, products

import lstmcore
from lstmcore import cli
from lstmcore.cli import facts, parity, report

# A library that does not import: what stands in for it raises; then what info says of it, and of the backend.
BROKEN = {
    "numba too old for NumPy": (
        "numba",
        'ImportError("Numba needs NumPy 2.4 or less")',
        "Numba needs NumPy 2.4 or less",
    ),
    "llvmlite without its library": (
        "llvmlite",
        'OSError("libllvmlite.so: cannot open")',
        "libllvmlite.so: cannot open",
    ),
    "no numba": ("numba", "ModuleNotFoundError(\"No module named 'numba'\", name='numba')", "No module named 'numba'"),
    "a broken triton": ("triton", 'ImportError("libtriton.so: undefined symbol")', "libtriton.so: undefined symbol"),
}


def info(capsys, *options: str) -> tuple[int, str]:
    status = cli.main(["info", *options])
    output, errors = capsys.readouterr()
    assert not errors
    return status, output


def test_all_of_it_can_be_told(capsys):
    status, output = info(capsys)
    assert status == 0
    assert "cannot be told" not in output
    for text in (
        *(lstmcore.__version__, torch.__version__, "numba", "llvmlite", "numpy", "triton", "OpenMP", "BLAS", "oneDNN"),
        *("system", "processor", "cores", "memory", "container limit", "GPU driver", "cuDNN"),
        *("threads", "kernel cache", "backend 'numba'", "float32", "bfloat16", "auto", "H     B"),
    ):
        assert text in output, text


def test_markdown_is_one_piece(capsys):
    status, output = info(capsys, "--markdown")
    assert status == 0
    first, *_, last = output.strip().splitlines()
    assert first.startswith(f"<details><summary>lstmcore {lstmcore.__version__}, torch {torch.__version__}, numba ")
    assert last == "</details>"
    assert output.count("```") == 2


def test_variables_that_matter_and_no_others(capsys, monkeypatch):
    home = pathlib.Path.home()
    for name, value in {
        "OMP_NUM_THREADS": "3",
        "TORCH_LOGS": "+dynamo",
        "LD_PRELOAD": f"{home}/lib/libtcmalloc.so",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MY_API_TOKEN": "hush",
        "TORCHESTRA": "x",
    }.items():
        monkeypatch.setenv(name, value)
    _, output = info(capsys)
    for text in ("OMP_NUM_THREADS", "+dynamo", "~/lib/libtcmalloc.so", "ATEN_CPU_CAPABILITY  "):
        assert text in output, text
    for text in ("hush", "TORCHESTRA"):
        assert text not in output
    assert f"{home}/" not in output


def test_nothing_private(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    for text, expected in {
        "/home/ada/.cache/x": "~/.cache/x",
        "/home/ada": "~",
        "/home/adam/x": "/home/adam/x",
        "/scratch/ada/run": "/scratch/<user>/run",
        "a:/home/ada/lib:/tmp/ada": "a:~/lib:/tmp/<user>",
        "Canada": "Canada",
    }.items():
        assert facts.private(text) == expected
    monkeypatch.setattr(getpass, "getuser", lambda: (_ for _ in ()).throw(KeyError("uid not found: 1000")))
    assert facts.private("/home/ada/x, /srv/ada") == "~/x, /srv/ada"


def test_a_fact_that_fails_is_told_as_such():
    assert facts.told(lambda: str(1 / 0)) == "cannot be told: ZeroDivisionError: division by zero"
    assert facts.told(lambda: next(iter(()))) == "cannot be told: StopIteration: no message"


@pytest.mark.parametrize(
    ("found", "features", "expected"),
    [
        (products.Products("tdpbf16ps"), {"amx-bf16": True}, "tdpbf16ps (AMX)"),
        (products.Products("dpbf16ps"), {"avx512bf16": True}, "dpbf16ps (AVX512-BF16)"),
        (products.FMA, {}, "fma, in float32"),
        (products.FMA, {"amx-bf16": True, "avx512bf16": True}, "fma, in float32; the system does not permit AMX"),
    ],
    ids=lambda value: getattr(value, "instruction", None),
)
def test_what_multiplies_bfloat16(found, features, expected, capsys, monkeypatch):
    monkeypatch.setattr(
        products, "this_machines", lambda dtype, isa: found if dtype == torch.bfloat16 else products.FMA
    )
    monkeypatch.setattr(products, "features", lambda: features)
    monkeypatch.setattr(products, "tiles_permitted", lambda: found.tiled)
    assert facts.bfloat16_products() == expected
    (line,) = (line for line in info(capsys)[1].splitlines() if line.startswith("bfloat16 multiplied by"))
    assert line.endswith(expected)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_broken_is_said(broken, tmp_path):
    """The command goes on, with status 0, and the lines of what is broken say why."""
    library, error, expected = BROKEN[broken]
    program = textwrap.dedent(f"""
        import importlib.abc, sys
        class Broken(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == {library!r} or name.startswith({library + "."!r}):
                    raise {error}
        import torch, lstmcore.cli
        sys.meta_path.insert(0, Broken())
        sys.exit(lstmcore.cli.main(["info"]))
    """)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if expected in line]
    assert any(line.startswith(library) for line in lines), done.stdout
    assert any(line.startswith("backend ") for line in lines), done.stdout
    if library != "triton":  # "auto" goes on without its kernels
        assert "float32   training   torch" in done.stdout


@pytest.mark.parametrize(
    ("groups", "files", "cores", "memory"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000", "a/b/memory.max": "2147483648"}, 1.5, "2.0 GiB"),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max"}, None, "none"),
        (
            "4:memory:/a\n2:cpu,cpuacct:/a\n1:name=systemd:/\n",
            {
                "cpu/a/cpu.cfs_quota_us": "200000",
                "cpu/a/cpu.cfs_period_us": "100000",
                "memory/a/memory.limit_in_bytes": "3221225472",
            },
            2.0,
            "3.0 GiB",
        ),
        (
            "4:memory:/\n2:cpu:/\n",
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            None,
            "none",
        ),
        ("", {}, None, "none"),
    ],
    ids=["version 2", "version 2, unlimited", "version 1", "version 1, unlimited", "no groups"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_limits_of_a_container(groups, files, cores, memory, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "groups").write_text(groups)
    monkeypatch.setattr(facts, "_CGROUP", tmp_path)
    monkeypatch.setattr(facts, "_CGROUPS", tmp_path / "groups")
    assert facts.cpu_limit() == cores
    assert facts.memory().endswith(f"container limit {memory}")


def line(error: float) -> parity.Line:
    return parity.Line(parity.COMPARISONS[0], "outputs", error, 1e-6)


@pytest.mark.parametrize(
    ("found", "status", "text"),
    [
        ([line(1e-7)], 0, "1 of 1 ok"),
        ([line(1e-7), line(1e-3)], 1, "1 of 2 ok"),
        ([line(float("nan"))], 1, "FAILED: plain"),
    ],
)
def test_check_says_what_is_wrong(found, status, text, capsys, monkeypatch):
    monkeypatch.setattr(report, "compare", lambda cases, device, backend: found)
    got, output = info(capsys, "--check")
    assert got == status
    assert text in output
    assert ("FAILED" in output) == bool(status)


def test_a_check_that_cannot_run_is_reported(capsys, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("LLVM IR parsing error")

    monkeypatch.setattr(report, "compare", fail)
    status, output = info(capsys, "--check")
    assert status == 1
    assert "FAILED: RuntimeError: LLVM IR parsing error" in output


def test_check_of_this_machine(capsys, monkeypatch):
    """test_cli.py runs them all."""
    assert {*report.QUICK} <= {case.name for case in parity.COMPARISONS}
    monkeypatch.setattr(report, "QUICK", ("plain",))
    monkeypatch.setattr(jit, "_tell_once", lambda: None)  # that kernels compile, where no test has needed them before
    status, output = info(capsys, "--check")
    assert status == 0, output
    assert "2 of 2 ok" in output
