"""The tables that were tuned here or come with the package: their files, and what "auto" makes of them."""

import multiprocessing
import os
import pathlib
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lstmcore.kernels.contract import Layer
from lstmcore.kernels.cpu import process
from lstmcore.kernels.cpu import threads as kernel_threads
from torch.nn.utils.rnn import pack_sequence

import lstmcore
from lstmcore import backends
from lstmcore.backends import Situation, machine, timings, tuning
from lstmcore.backends.machine import Device, Versions
from lstmcore.backends.timings import Timing, Verdict
from lstmcore.backends.tuning import Table

from ..support.timings import TIMING, timing

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
LAYER = Layer(CPU, torch.float32, 100, 8, 64, 64, training=True)
LOSES = {"ours_short_ms": 4.0, "ours_long_ms": 9.0}  # 0.28x at 100 steps
PACKAGE = pathlib.Path(tuning.__file__).parent / "measured"


def this_machine(*found: Timing, where: torch.device = CPU, **changes: object) -> Table:
    """A table of this machine and its versions, as they are now, with some of their entries changed."""
    device, versions = machine.device(where, kernel_threads.count()), machine.versions(where.type)
    for name, value in changes.items():
        device = device._replace(**{name: value}) if name in Device._fields else device
        versions = versions._replace(**{name: value}) if name in Versions._fields else versions
    return Table(device, versions, found or (TIMING,))


def keep(table: Table) -> pathlib.Path:
    path = tuning.path_of(table.device, table.versions)
    tuning.write(table, path)
    backends.forget()
    return path


def why(layer: Layer = LAYER, backend: str = "numba", **situation) -> tuple[str, str]:
    """What "auto" chooses, and what it says of our kernels."""
    choice = backends.choose("auto", (layer,), Situation.now(layer, False)._replace(**situation))
    return choice.name, dict(choice.reasons)[backend]


# Text

names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
times = st.floats(1e-6, 1e6)
rows = st.builds(
    Timing, st.sampled_from(timings.KINDS), st.sampled_from(timings.ARITHMETICS), st.sampled_from(timings.MODES),
    st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 8), st.integers(9, 4096), times, times, times, times,
    st.floats(0, 10), st.booleans(), st.dates().map(str), st.integers(0, 9),
)  # fmt: skip
tables = st.builds(
    Table, st.builds(Device, st.sampled_from(["cpu", "cuda"]), names, st.integers(1, 999), names),
    st.builds(Versions, names, names, names, names),
    st.lists(rows, min_size=1, max_size=5, unique_by=lambda each: (each.cls, each.hidden, each.batch)).map(tuple),
)  # fmt: skip


@given(tables)
def test_a_table_is_read_as_it_was_written(table):
    assert tuning.from_text(tuning.to_text(table)) == table


GOOD = tuning.to_text(Table(Device("cpu", "A", 2, "avx2"), Versions("2", "numba 1", "", "k"), (TIMING,)))


@given(st.integers(0, len(GOOD) - 1), st.characters())
def test_a_damaged_table_is_refused_or_in_range(at, character):
    """No change of a character is an error of another kind, and what is read can be judged by."""
    try:
        table = tuning.from_text(GOOD[:at] + character + GOOD[at + 1 :])
    except ValueError:
        return
    for each in table.timings:
        assert isinstance(each.verdict(100, "here"), Verdict)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (GOOD, "", "columns"),
        (GOOD, "\0\0\0", "columns"),
        ("device_kind", "something", "columns"),
        (GOOD, GOOD.splitlines()[0], "no timings"),
        (",2026-11-27,0\n", "", "date is None"),
        ("2026-11-27,0\n", "2026-11-27,0,1\n", "more than 23 entries"),
        ("dense", "sparse", "kind is 'sparse': expected one of dense"),
        ("float32", "int8", "arithmetic is 'int8'"),
        ("2026-11-27", "yesterday", "date is 'yesterday'"),
        (",0.5,", ",nan,", "ours_short_ms is 'nan': expected a positive number"),
        (",0.5,", ",-0.5,", "ours_short_ms"),
        (",0.5,", ",inf,", "ours_short_ms"),
        (",0.5,", ",0,", "ours_short_ms"),
        (",0.5,", ',"0.5,', "it is not CSV"),
        (",64,8,", ",0,8,", "hidden is '0': expected an integer from 1"),
        (",64,8,", ",64.5,8,", "hidden is '64.5'"),
        (",64,8,", ",1e3,8,", "hidden"),
        (",64,8,", ",99999999999,8,", "hidden"),
        (",4,68,", ",68,68,", "not shorter"),
        (",0.02,", ",-1,", "noise"),
        (",1,2026", ",yes,2026", "right"),
        (GOOD, GOOD + GOOD.splitlines()[1] + "\n", "two timings of one shape"),
        (GOOD, GOOD + GOOD.splitlines()[1].replace("avx2", "avx512") + "\n", "more than one device"),
    ],
)
def test_what_is_not_in_order_is_refused(old, new, expected):
    assert old in GOOD
    with pytest.raises(ValueError, match=expected):
        tuning.from_text(GOOD.replace(old, new, 1))


# Files


def test_nothing_is_kept_by_calls(tuned_here):
    """What is not asked for by the command is not done."""
    module = lstmcore.LSTM(3, 16)
    for _ in range(3):
        module(torch.randn(50, 4, 3))[0].sum().backward()
    lstmcore.explain(module, torch.randn(50, 4, 3))
    assert not tuned_here.exists()
    assert not tuned_here.parent.exists()


def test_nothing_is_read_twice(tuned_here, monkeypatch):
    keep(this_machine())
    reads = []
    read = tuning.read
    monkeypatch.setattr(tuning, "read", lambda path: reads.append(path) or read(path))
    for steps in range(50, 60):
        assert "tuned here" in why(LAYER._replace(steps=steps))[1]
    assert len(reads) == 2  # this machine's, and the package's, which is not there


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\0", b"torch", GOOD.encode(), b"x" * (tuning._LARGEST + 1)], ids=["empty", "bytes",
    "text", "another machine's", "large"],
)  # fmt: skip
def test_a_file_that_is_not_in_order_is_not_used(content, tuned_here):
    """Calls go by the rule, and why it is not used can be read."""
    expected = why()
    path = keep(this_machine(timing(**LOSES)))
    assert why() != expected
    path.write_bytes(content)
    backends.forget()
    assert why() == expected
    known = tuning.known(CPU, kernel_threads.count())
    assert not known.tables
    assert f"{path} is not used" in known.ignored[0]


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root reads every file")
def test_a_file_that_cannot_be_read_is_not_used(tuned_here):
    keep(this_machine()).chmod(0)
    assert not tuning.known(CPU, kernel_threads.count()).tables


def test_a_directory_in_its_place_is_not_used(tuned_here):
    path = keep(this_machine())
    path.unlink()
    path.mkdir()
    backends.forget()
    assert "is not used" in tuning.known(CPU, kernel_threads.count()).ignored[0]


@pytest.mark.parametrize("changed", [{"torch": "1.0"}, {"compiler": "numba 0.1"}, {"kernels": "0"}], ids=str)
def test_other_versions_do_not_count(changed, tuned_here):
    expected = why()
    keep(this_machine(timing(**LOSES), **changed))
    assert why() == expected
    assert "of other versions or kernels" in tuning.known(CPU, kernel_threads.count()).ignored[0]


@pytest.mark.parametrize("changed", [{"name": "A Made Up CPU"}, {"isa": "sse"}, {"units": 77}], ids=str)
def test_other_devices_do_not_count(changed, tuned_here):
    expected = why()
    keep(this_machine(timing(**LOSES), **changed))
    assert why() == expected
    assert not tuning.known(CPU, kernel_threads.count()).ignored


def test_by_the_number_of_threads(tuned_here, threads):
    """What was tuned with two threads does not say what one does."""
    threads(2)
    keep(this_machine(timing(**LOSES)))
    assert why()[0] == "torch"
    threads(1)
    assert why()[0] == "numba"
    assert "tuned" not in why()[1]
    threads(2)
    assert why()[0] == "torch"


def test_in_a_graph_the_threads_are_not_known(tuned_here):
    """Its forward and its backward have to choose alike, whatever is set between them."""
    keep(this_machine(timing(**LOSES)))
    assert backends.in_graph("auto", LAYER, extended=False) == "numba"


def test_two_tunings_at_once_are_refused(tuned_here):
    with tuning.locked(), pytest.raises(RuntimeError, match="another tuning runs"), tuning.locked():
        pytest.fail("both of them run")
    with tuning.locked():
        assert tuned_here.is_dir()


def _tunes(directory: str, ready: multiprocessing.Queue, go_on: multiprocessing.Event) -> None:
    tuning.directory = lambda: pathlib.Path(directory)
    with tuning.locked():
        ready.put(True)
        go_on.wait(60)


@pytest.mark.slow
def test_the_lock_writes_to_no_other_file(tuned_here, tmp_path):
    """Where somebody else has put a link into its place."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    tuning.directory().mkdir(parents=True, exist_ok=True)
    (tuning.directory() / "lock").unlink(missing_ok=True)
    (tuning.directory() / "lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), tuning.locked():
        pytest.fail("it followed the link")
    assert victim.read_text() == "kept"


def test_a_processor_that_does_not_say_its_name(monkeypatch):
    def unreadable(*_, **__):
        raise PermissionError("no")

    machine.processor.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(machine.Path, "read_text", unreadable)
        assert machine.processor()
        assert lstmcore.LSTM(4, 8)(torch.randn(3, 2, 4))[0].shape == (3, 2, 8)
    machine.processor.cache_clear()


def test_a_tuning_that_dies_leaves_no_lock(tuned_here):
    context = multiprocessing.get_context("spawn")
    ready, go_on = context.Queue(), context.Event()
    other = context.Process(target=_tunes, args=(str(tuned_here), ready, go_on))
    other.start()
    try:
        assert ready.get(timeout=120)
        with pytest.raises(RuntimeError, match="another tuning runs"), tuning.locked():
            pytest.fail("both of them run")
    finally:
        other.kill()
        other.join(60)
    with tuning.locked():
        pass


def test_readers_find_the_old_table_or_the_new_one(tuned_here):
    """While writers replace it."""
    versions = [this_machine(*(timing(hidden=64 + at) for at in range(count))) for count in (1, 40)]
    path, found, done = keep(versions[0]), set(), threading.Event()

    def write(table: Table) -> None:
        while not done.is_set():
            tuning.write(table, path)

    writers = [threading.Thread(target=write, args=(table,)) for table in versions]
    for writer in writers:
        writer.start()
    try:
        for _ in range(200):
            found.add(len(tuning.read(path).timings))
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert found <= {1, 40}
    assert [each.name for each in tuned_here.iterdir()] == [path.name]


def test_a_disk_that_is_full_leaves_the_old_table(tuned_here, monkeypatch):
    path = keep(this_machine())
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        tuning.write(this_machine(timing(**LOSES)), path)
    assert [each.name for each in tuned_here.iterdir()] == [path.name]
    assert path.read_bytes() == before


# What "auto" makes of them


def test_auto_obeys_in_both_directions(tuned_here):
    """Against the rule, which takes ours for a hundred steps and torch's for five."""
    long, short = LAYER, LAYER._replace(steps=9)
    assert (why(long)[0], why(short)[0]) == ("numba", "torch")
    keep(this_machine(timing(**LOSES)))
    name, reason = why(long)
    assert name == "torch"
    assert reason.startswith("torch's was faster when tuned here on 2026-11-27: ours 0.2")
    keep(this_machine(timing(torch_short_ms=1.0)))
    name, reason = why(short)
    assert name == "numba"
    assert "(tuned here on 2026-11-27, 1." in reason
    assert (
        "x as fast as torch's within 2 % (dense float32 training of H 64, B 8, faster for any number of steps)"
        in reason
    )


def test_the_number_of_steps_decides(tuned_here):
    keep(this_machine())
    assert TIMING.span == (20, float("inf"))
    for steps, expected in ((19, "torch"), (20, "numba"), (1000, "numba")):
        name, reason = why(LAYER._replace(steps=steps))
        assert name == expected
        assert "from 20 steps on" in reason


def test_what_runs_is_what_is_chosen(tuned_here, monkeypatch):
    kernels, calls = backends.load("numba"), []
    original = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    module, x = lstmcore.LSTM(64, 64), torch.randn(100, 8, 64)
    for changes, ours in (({}, True), (LOSES, False)):
        keep(this_machine(timing(**changes)))
        calls.clear()
        module(x)
        assert bool(calls) == ours
        assert lstmcore.explain(module, x).name == ("numba" if ours else "torch")


def test_what_was_wrong_is_never_taken(tuned_here):
    keep(this_machine(timing(right=False)))
    name, reason = why()
    assert name == "torch"
    assert "wrong" in reason
    assert "lstmcore check" in reason


@pytest.mark.parametrize("changes", [{"hidden_size": 65}, {"batch": 9}, {"hidden_size": 15}, {"training": False},
    {"dtype": torch.float64}, {"proj_size": 3}, {"ragged": True}], ids=str)  # fmt: skip
def test_what_was_not_tuned_goes_by_the_rule(changes, tuned_here):
    layer = LAYER._replace(**changes)
    expected = why(layer)
    keep(this_machine(timing(**LOSES)))
    assert why(layer) == expected


def test_extended_calls_are_not_affected(tuned_here):
    """torch's LSTM does not run them."""
    keep(this_machine(timing(**LOSES, right=False)))
    assert why(extended=True)[0] == "numba"
    module, x = lstmcore.LSTM(64, 64), torch.randn(100, 8, 64)
    assert lstmcore.explain(module, x).name == "torch"
    assert lstmcore.explain(module, x, extended=True).name == "numba"
    assert lstmcore.explain(lstmcore.LSTM(64, 64, backend="numba"), x).name == "numba"
    module(x, lengths=torch.full((8,), 100))
    assert why(orphan=True)[0] == "numba"


def test_packed_calls_have_a_class_of_their_own(tuned_here):
    keep(this_machine(timing(kind="ragged", **LOSES)))
    packed = pack_sequence([torch.randn(n, 64) for n in range(100, 92, -1)])
    module = lstmcore.LSTM(64, 64)
    assert lstmcore.explain(module, packed).name == "torch"
    assert lstmcore.explain(module, torch.randn(100, 8, 64)).name == "numba"


def test_every_layer_of_a_stack_counts(tuned_here):
    keep(this_machine())
    narrow = LAYER._replace(hidden_size=16)
    other = timing(hidden=16, ours_short_ms=4.0, ours_long_ms=9.0)
    keep(this_machine(TIMING, other))
    situation = Situation.now(LAYER, False)
    assert backends.choose("auto", (LAYER, LAYER), situation).name == "numba"
    assert backends.choose("auto", (LAYER, narrow), situation).name == "torch"


def test_what_is_tuned_here_goes_before_the_packages(tuned_here):
    """The package's counts for any versions; where neither has the class, the rule does."""
    table = this_machine(timing(**LOSES), torch="1.0", kernels="0")
    tuning.write(table, tuning.COMMITTED / f"{table.device.slug}.csv")
    backends.forget()
    name, reason = why()
    assert name == "torch"
    assert "torch's was faster when timed for the package on 2026-11-27: ours 0.2" in reason
    keep(this_machine())
    assert why()[0] == "numba"
    assert "tuned here" in why()[1]
    keep(this_machine(timing(mode="inference")))
    assert why()[0] == "torch"


def test_the_packages_table_has_to_be_of_the_device(tuned_here):
    table = this_machine(timing(**LOSES), name="A Made Up CPU")
    path = tuning.COMMITTED / f"{this_machine().device.slug}.csv"
    tuning.write(table, path)
    backends.forget()
    assert why()[0] == "numba"
    assert f"{path} is not used" in tuning.known(CPU, kernel_threads.count()).ignored[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.csv")) or [None], ids=str)
def test_the_packages_tables_are_in_order(path):
    if path is None:
        assert not PACKAGE.is_dir() or not list(PACKAGE.iterdir())
        return
    table = tuning.read(path)
    assert path.name == f"{table.device.slug}.csv"
    assert all(each.right for each in table.timings)


def test_in_a_forked_child_torchs_is_not_chosen(tuned_here, monkeypatch):
    """It may wait there for threads that only the parent has, however fast it was."""
    keep(this_machine(timing(**LOSES)))
    monkeypatch.setattr(process, "torch_would_hang", lambda: True)
    assert backends.choose("auto", (LAYER,), Situation.now(LAYER, False)).name == "numba"


# On a GPU, which is made up

DENSE = Layer(GPU, torch.bfloat16, 500, 16, 512, 512)


WON = {"kind": "dense", "arithmetic": "bfloat16", "mode": "inference", "hidden": 512, "batch": 16}


def test_a_gpu_that_was_tuned(gpu_here):
    name, reason = why(DENSE, "triton")
    assert name == "torch"
    assert "not measured on NVIDIA Made Up: `python -m lstmcore tune` does" in reason
    keep(this_machine(timing(**WON), where=GPU))
    name, reason = why(DENSE, "triton")
    assert name == "triton"
    assert "(tuned here on 2026-11-27, 1." in reason
    assert reason.partition(": ")[2].startswith("forward split")
    keep(this_machine(timing(**WON, **LOSES), where=GPU))
    assert why(DENSE, "triton")[0] == "torch"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 1024}, "H 1024 is beyond the largest that was timed of dense bfloat16 inference, 512"),
        ({"batch": 17}, "B 17 is beyond the largest"),
        ({"training": True}, "no dense bfloat16 training was timed"),
        ({"dtype": torch.float16}, "no dense float16 inference was timed"),
        ({"dtype": torch.float32}, "no dense tf32 inference was timed"),
    ],
)
def test_what_was_not_tuned_of_a_gpu_is_left_to_torch(gpu_here, changes, expected):
    keep(this_machine(timing(**WON), where=GPU))
    name, reason = why(DENSE._replace(**changes), "triton")
    assert name == "torch"
    assert "not measured on NVIDIA Made Up" in reason
    assert expected in reason


def test_float32_with_tf32_and_without_are_two_classes(gpu_here, monkeypatch):
    keep(this_machine(timing(**{**WON, "arithmetic": "tf32"}), where=GPU))
    layer = DENSE._replace(dtype=torch.float32)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    assert why(layer, "triton")[0] == "triton"
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    assert why(layer, "triton")[0] == "torch"


def test_a_part_of_a_gpu_is_another_device(gpu_here, monkeypatch):
    keep(this_machine(timing(**WON), where=GPU))
    found = vars(torch.cuda.get_device_properties(GPU)) | {"multi_processor_count": 66}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(**found))
    backends.forget()
    assert why(DENSE, "triton")[0] == "torch"


def test_extended_calls_on_a_gpu_are_not_affected(gpu_here):
    keep(this_machine(timing(**WON, **LOSES), where=GPU))
    assert why(DENSE, "triton", extended=True)[0] == "triton"
