"""A visit to a GPU, as far as a machine without one can tell: the parts that are not an experiment."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import cli, tables
from bench.cases import select
from bench.gpu import install, packing, smoke, streams, visit
from bench.measure import NOTHING

# --- installing --------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(install, "PIP", (sys.executable, "-c", "raise SystemExit('pip was asked')"))
    assert install.run() == 0
    assert capsys.readouterr().out == "lstmcore is importable from this checkout: nothing to install\n"


def test_a_package_of_another_place_is_seen(monkeypatch, tmp_path):
    """Another checkout's, and none at all."""
    monkeypatch.setattr(install, "PROBE", f"print({str(tmp_path)!r})")
    assert str(tmp_path) in install.found()
    monkeypatch.setattr(install, "PROBE", "import nothing_of_that_name")
    assert install.found() == "ModuleNotFoundError: No module named 'nothing_of_that_name'"


def test_what_is_missing_is_installed(monkeypatch, capfd):
    """A stand-in for pip; its status is the answer, and the package has to be there afterwards."""
    found = iter(["it is missing", None, "it is missing", "it is still missing", "it is missing"])
    monkeypatch.setattr(install, "found", lambda: next(found))
    monkeypatch.setattr(install, "PIP", (sys.executable, "-c", "print('pip was asked')"))
    assert install.run() == 0
    output = capfd.readouterr().out
    assert "it is missing: runs " in output
    assert "pip was asked" in output.splitlines()
    assert "lstmcore was installed from this checkout" in output
    assert install.run() == 1
    assert "not installed: it is still missing" in capfd.readouterr().out
    assert install.run(dry_run=True) == 0
    output = capfd.readouterr().out
    assert "would run" in output
    assert "pip was asked" not in output.splitlines()


def test_a_pip_that_fails_says_so(monkeypatch, capsys):
    monkeypatch.setattr(install, "found", lambda: "it is missing")
    monkeypatch.setattr(install, "PIP", (sys.executable, "-c", "raise SystemExit(3)"))
    assert install.run() == 3
    assert "not installed: pip ended with status 3" in capsys.readouterr().out


def test_the_package_comes_before_the_command_line(monkeypatch, capsys):
    """What was just installed only a Python that starts afterwards finds, so the command goes on in one."""
    started = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append((path, arguments)))
    install.first(["gpu"])
    assert started == []
    monkeypatch.setattr(install, "found", lambda: "it is missing")
    monkeypatch.setattr(install, "run", lambda dry_run: 0)
    install.first(["gpu", "--minutes", "6"])
    assert started == [(sys.executable, [sys.executable, "-m", "bench", "gpu", "--minutes", "6"])]
    with pytest.raises(SystemExit) as ended:
        install.first(["gpu", "--dry-run"])
    assert ended.value.code == 2
    assert "the other stages need it" in capsys.readouterr().out
    monkeypatch.setattr(install, "run", lambda dry_run: 7)
    with pytest.raises(SystemExit) as ended:
        install.first(["gpu"])
    assert ended.value.code == 7


def test_installing_needs_no_package_of_ours():
    """It runs where nothing but Python is: without site-packages."""
    code = "import bench.gpu.install, sys; raise SystemExit(any(name.startswith('lstmcore') for name in sys.modules))"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=install.ROOT, check=True)


# --- a process a case --------------------------------------------------------------------------------------------


def test_each_small_case_has_its_process(monkeypatch, capsys):
    """One that breaks, one that hangs and one that dies without a word cost only themselves."""
    names = [case.name for case in select("smoke", "cuda")]
    ends = {
        names[0]: (0, f"a warning\n{names[0]}: largest error 1e-3, triton\nkey figures: 1 of 1"),
        names[1]: (1, f"{names[1]}: wrong result: far off\nkey figures: 0 of 1"),
        names[2]: (-11, ""),
        names[3]: (NOTHING, f"{names[3]}: not run: a backend refuses"),
        names[4]: (1, "Traceback\nRuntimeError: CUDA error: misaligned address"),
    }

    def process(command, **options):
        name = command[command.index("--case") + 1]
        if name not in ends:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return SimpleNamespace(returncode=ends[name][0], stdout=ends[name][1])

    monkeypatch.setattr(smoke.subprocess, "run", process)
    assert smoke.run(limit_s=9) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{names[0]}: largest error 1e-3, triton",
        f"{names[1]}: wrong result: far off",
        f"{names[2]}: failed: its process ended with status -11: it said nothing",
        f"{names[3]}: not run: a backend refuses",
        f"{names[4]}: failed: its process ended with status 1: RuntimeError: CUDA error: misaligned address",
        f"{names[5]}: failed: the 9 seconds for it were over",
        f"{tables.KEY_FIGURES}1 of 6 small cases are right",
    ]
    ends.update(dict.fromkeys(names, (NOTHING, "")), **{name: (NOTHING, f"{name}: not run") for name in names})
    assert smoke.run(limit_s=9) == NOTHING
    ends.update({name: (0, f"{name}: largest error 0") for name in names[:1]})
    assert smoke.run(limit_s=9) == 0


@pytest.mark.slow
def test_dry_smoke_runs_both_designs(capsys):
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU: make gpu runs the stage itself")
    assert cli.main(["smoke", "--dry-run"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told[:-1]] == list(smoke.DRY)
    assert "forward resident" in told[0]
    assert "forward split" in told[1]
    assert told[-1].endswith("2 of 2 small cases are right")


# --- two streams -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dry_streams(capsys):
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU: make gpu runs the stage itself")
    assert cli.main(["streams", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert told.count(": right, within") == len(streams.PAIRS)
    assert f"{tables.KEY_FIGURES}4 of 4 pairs are right" in told


class Made:
    """Work of a pair that returns what it is told to, call by call."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def build(self, device: str, steps: int) -> streams.Work:
        return lambda: (torch.full((2,), self.values.pop(0) if len(self.values) > 1 else self.values[0]),)


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_streams_that_disturb_each_other_are_seen(monkeypatch, capsys, value):
    pairs = (streams.Pair("good", Made(1.0), Made(2.0)), streams.Pair("bad", Made(1.0, value), Made(2.0)))
    monkeypatch.setattr(streams, "PAIRS", pairs)
    assert streams.run(dry_run=True) == 1
    told = capsys.readouterr().out
    assert "WRONG: results differ by" in told
    assert f"{tables.KEY_FIGURES}1 of 2 pairs are right" in told


def test_a_kernel_that_gives_up_is_seen_and_the_next_pair_runs(monkeypatch, capsys):
    gave_up = iter([None, RuntimeError("gave up waiting")])

    def settle() -> None:
        if (error := next(gave_up, None)) is not None:
            raise error

    place = streams.Place("cpu", 2, 1, streams.Place.dry().lanes, settle)
    monkeypatch.setattr(streams.Place, "dry", lambda: place)
    monkeypatch.setattr(streams, "PAIRS", (streams.Pair("bad", Made(1.0), Made(2.0)),) * 2)
    assert streams.run(dry_run=True) == 1
    told = capsys.readouterr().out
    assert "WRONG: gave up waiting" in told
    assert "1 of 2 pairs are right" in told


def test_streams_are_timed_and_end_in_time(monkeypatch, capsys):
    """On a GPU both at once stand beside one after the other; here the work is a CPU's."""
    monkeypatch.setattr(streams.Place, "gpu", streams.Place.dry)
    monkeypatch.setattr(streams, "spread", lambda share, limit_s: "compiled")
    monkeypatch.setattr(streams, "PAIRS", (streams.Pair("good", Made(1.0), Made(2.0)),) * 2)
    assert streams.run(limit_s=60) == 0
    told = capsys.readouterr().out
    assert told.count(" ms at once, ") == 2
    assert "of one after the other" in told.splitlines()[-1]
    assert streams.run(limit_s=-1) == 0
    assert "not run, the -1 seconds are used up" in capsys.readouterr().out


def test_either_order_is_tried():
    ran = []
    place = streams.Place.dry()
    works = [lambda index=index: ran.append(index) or (index,) for index in streams.ORDER]
    assert place.at_once(works, streams.ORDER[::-1]) == [(0,), (1,)]
    assert place.at_once(works) == [(0,), (1,)]
    assert ran == [1, 0, 0, 1]


# --- what is left behind -----------------------------------------------------------------------------------------


def written(out: Path, **files: int) -> None:
    """Files of so many bytes that do not compress, by their names with _ for a dot and __ for a slash."""
    for name, size in files.items():
        path = out / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size))


def test_few_files_are_left(tmp_path):
    written(tmp_path, gpu_log=10, summary_txt=10, h200_csv=10, images__a_png=9, images__deep__b_png=9, trace_json=9)
    assert packing.pack(tmp_path) == ["3 more files are in rest.zip"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["gpu.log", "h200.csv", "rest.zip", "summary.txt"]
    with zipfile.ZipFile(tmp_path / "rest.zip") as archive:
        assert sorted(archive.namelist()) == ["images/a.png", "images/deep/b.png", "trace.json"]
    assert packing.pack(tmp_path) == [], "again, and nothing is left to pack"


def test_a_later_visit_leaves_the_archive_of_an_earlier_one(tmp_path):
    for name in ("first", "second"):
        before = packing.listing(tmp_path).items()
        (tmp_path / f"{name}.png").write_text(name)
        (told,) = packing.pack(tmp_path, before)
    assert told == "1 more files are in rest-2.zip"
    for name, archive in (("first", "rest.zip"), ("second", "rest-2.zip")):
        with zipfile.ZipFile(tmp_path / archive) as file:
            assert file.namelist() == [f"{name}.png"]


def test_only_what_is_new_is_packed(tmp_path):
    """A folder may hold somebody's own files."""
    written(tmp_path, mine_png=9, own__deep_txt=9)
    before = packing.listing(tmp_path)
    written(tmp_path, gpu_log=9, plot_png=9)
    assert packing.pack(tmp_path, before) == ["1 more files are in rest.zip"]
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["gpu.log", "mine.png", "own/deep.txt", "rest.zip"]


def test_many_and_large_files(tmp_path, monkeypatch):
    """No more than eight whatever is there; a file that no archive may hold is named."""
    monkeypatch.setattr(packing, "MOST_BYTES", 4096)
    written(tmp_path, gpu_log=2000, summary_txt=10, **{f"r{i}_csv": 10 for i in range(9)}, huge_bin=9000)
    (told, _) = packing.pack(tmp_path)
    assert told == "too large to pack, left as it is: huge.bin (9000 bytes)"
    left = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(left) - 1 == packing.MOST_FILES
    assert {"gpu.log", "summary.txt", "rest.zip"} <= left.keys()
    assert all(size <= 4096 for name, size in left.items() if name != "huge.bin")


def stages(*programs: str) -> tuple[visit.Stage, ...]:
    """Stages of short Python programs; OUT in one is the folder for files."""

    def commands(program: str):
        return lambda its: [[sys.executable, "-c", program.replace("OUT", repr(str(its.out)))]]

    return tuple(visit.Stage(f"stage{i}", "a test", 10, commands(each)) for i, each in enumerate(programs))


WRITES = "import pathlib; pathlib.Path(OUT, 'plot.png').write_text('a plot')"


@pytest.mark.parametrize("fails", ["raise SystemExit(1)", "import os, signal; os.kill(os.getppid(), signal.SIGTERM)"])
def test_files_are_packed_after_a_failure_and_after_an_interruption(monkeypatch, tmp_path, capsys, fails):
    monkeypatch.setattr(visit, "STAGES", stages(WRITES, fails + "; import time; time.sleep(20)"))
    monkeypatch.setattr(visit, "GRACE_S", 0.2)
    assert visit.run(None, 1.0, tmp_path, None, dry_run=True) == (1 if "SystemExit" in fails else 130)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.log", "rest.zip", "summary.txt"]
    assert "stage0" in (tmp_path / "summary.txt").read_text()
    assert "1 more files are in rest.zip" in capsys.readouterr().out


def test_a_short_visit_leaves_out_what_would_not_be_done(monkeypatch, tmp_path, capsys):
    """By its name it runs all the same; and every stage that is left gets seven tenths of its time in six minutes."""
    long = {each.name for each in visit.STAGES if each.from_minutes}
    assert {each.name for each in visit.left_out(visit.STAGES, 6)} == long == {"tests", "flow", "sanitizer"}
    assert visit.left_out(visit.STAGES, 10) == []
    kept = [each for each in visit.STAGES if each.name not in long]
    share = visit.shares(kept, 6)
    assert all(share[each.name] > 0.7 * each.limit_s for each in kept)
    one, two = stages("print('first')", "print('another')")
    monkeypatch.setattr(visit, "STAGES", (one, visit.replace(two, from_minutes=8)))
    assert visit.run(None, 1.0, tmp_path, None, dry_run=True) == 0
    told = (tmp_path / "summary.txt").read_text()
    assert "left out" in told
    assert "for visits from 8 minutes on; --stage stage1 runs it by itself" in told
    assert "another" not in told
    assert [line.split()[0] for line in told.splitlines()[:3]] == ["stage", "stage0", "stage1"], "in their order"
    assert visit.run(["stage1"], 1.0, tmp_path, None, dry_run=True) == 0
    assert "another" in (tmp_path / "summary.txt").read_text()


def test_a_table_without_rows_says_so(tmp_path):
    assert "no step of a shape was timed" in visit.last_tables([], tmp_path, dry_run=False)[-1]
    (tmp_path / "some-132sm.csv").write_text("of,other,columns\n")
    assert visit.last_tables([], tmp_path, dry_run=False)[-1].startswith("no table: ")


def test_designs_have_equal_parts_of_the_time(tmp_path):
    """After compiling, every shape gets as much."""
    stage = {each.name: each for each in visit.STAGES}["designs"]
    (command,) = stage.commands(visit.Visit(tmp_path, seconds=visit.START_S + 100))
    each = float(command[command.index("--seconds") + 1])
    assert each == pytest.approx(50 / len(select("designs", "cuda")), abs=0.1)


def test_the_last_tables_fit_a_screen(tmp_path):
    outcomes = [visit.Outcome("bench", "ok", 170.4, "a figure, " * 30), visit.Outcome("plots", "skipped", 0.0, "")]
    lines = visit.last_tables(outcomes, tmp_path, dry_run=True)
    assert max(map(len, lines)) <= visit.SCREEN
    assert sum("a figure" in line for line in lines) > 1, "what is long goes on in the next line"
    assert len(lines) <= 30
