"""Launches on torch's own threads: whose they are, when there are too few, and that torch keeps what it has."""

from __future__ import annotations

import os
import sys
import textwrap

import pytest

from ..support.processes import PRELUDE, in_process, run_program

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(sys.platform != "linux", reason="torch's threads are reached on Linux only"),
]

JOBS = """
jobs = [dict(T=60, B=16, H=64), dict(T=60, B=16, H=64, bidirectional=True), dict(T=20, B=1, H=256)]  # that in lockstep
alone = []
torch.set_num_threads(1)
for k, job in enumerate(jobs):
    alone.append(work(seed=k, **job))

def right():
    return all(torch.equal(work(seed=k, **job), alone[k]) for k, job in enumerate(jobs))
"""


def run(code: str, **environment: str | None) -> None:
    run_program(PRELUDE + JOBS + textwrap.dedent(code), **environment)


@pytest.mark.slow
def test_bits_of_the_pool():
    """For any number of threads, more than there are cores too."""
    run("""
        launched = shared_out("team")
        threads, team = sys.modules["lstmcore.kernels.cpu.threads"], sys.modules["lstmcore.kernels.cpu.team"]
        load = team._load
        for count in (2, 3, 5, 8, 16):
            threads._cores = lambda: count
            torch.set_num_threads(count)
            for whose, loads in (("team", load), ("pool", lambda: "not in this test")):
                team._load = loads
                launched.clear()
                assert right() and launched == {whose}, (count, launched)
    """)


def test_torch_keeps_its_threads():
    """A launch of fewer members than torch has threads ends none of them; nor does it start any."""
    run("""
        launched = shared_out("team")
        sys.modules["lstmcore.kernels.cpu.threads"]._cores = lambda: 6
        torch.set_num_threads(6)
        wide = torch.randn(512, 512)
        wide @ wide
        (wide + wide).sum()
        before = set(os.listdir("/proc/self/task"))
        assert len(before) >= 6
        for _ in range(3):
            assert right()
            (wide + wide).sum()
        assert set(os.listdir("/proc/self/task")) == before and launched == {"team"}, launched
    """)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["OMP_THREAD_LIMIT=1", "OMP_THREAD_LIMIT=2"])
def test_a_team_smaller_than_asked_for(limit):
    """No member waits for one that does not come: the pool runs the launch, and those that follow."""
    name, value = limit.split("=")
    run(
        """
        launched = shared_out("team")
        threads = sys.modules["lstmcore.kernels.cpu.threads"]
        threads._cores = lambda: 4
        torch.set_num_threads(4)
        assert threads.describe() == "torch's own"
        assert right() and launched == {"team", "pool"}, launched
        assert "threads where 4 were asked for" in threads.describe(), threads.describe()
        launched.clear()
        assert right() and launched == {"pool"}, launched
        """,
        **{name: value},
    )


@pytest.mark.slow
def test_more_threads_than_cores():
    """Then the pool has as many as there are cores, and what torch's other threads would do is nobody's loss."""
    run("""
        launched = shared_out("team")
        threads = sys.modules["lstmcore.kernels.cpu.threads"]
        torch.set_num_threads(3)
        assert right() and launched == {"pool"} and "more threads than there are cores" in threads.describe()
    """)


@pytest.mark.slow
def test_neither_team_nor_pool():
    """A team that proves too small where the system refuses threads, too: an error once, then one thread."""
    run(
        """
        sys.modules["lstmcore.kernels.cpu.process"]._start_new_thread = lambda *given: None
        launched = shared_out("team")
        try:
            right()
            raise AssertionError("no error")
        except RuntimeError as error:
            assert "torch.set_num_threads(1)" in str(error), error
        assert right()
        """,
        OMP_THREAD_LIMIT="1",
    )


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["passive", "active", None])
def test_any_waiting_policy(policy):
    """Whether torch's threads spin or sleep between its operations; None: first one and then the other, as they do."""
    run('launched = shared_out("team")\nassert right() and launched == {"team"}', OMP_WAIT_POLICY=policy)


@pytest.mark.slow
def test_bound_threads():
    """The runtime pins the main thread to a core: what the system says of that thread are not the cores there are."""
    cores = len(os.sched_getaffinity(0))
    run(
        f"""
        threads = sys.modules["lstmcore.kernels.cpu.threads"]
        torch.set_num_threads(2)
        assert threads._cores() == {cores} and len(os.sched_getaffinity(0)) == 1
        launched = shared_out("team")
        assert right() and launched == {{"team"}}, launched
        """,
        OMP_PROC_BIND="true",
    )


@pytest.mark.slow
def test_dynamic_teams():
    run('launched = shared_out("team")\nfor _ in range(5): assert right()', OMP_DYNAMIC="true")


@pytest.mark.slow
def test_inside_of_a_team():
    """Called back from a parallel region, a call has no team to ask for."""
    run("""
        import ctypes
        launched = shared_out("team")
        team, threads = sys.modules["lstmcore.kernels.cpu.team"], sys.modules["lstmcore.kernels.cpu.threads"]
        results = []

        @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        def body(_):
            if threading.current_thread() is threading.main_thread():
                results.append((threads.describe(), right()))

        team._load().parallel(ctypes.cast(body, ctypes.c_void_p), None, 2, 0)
        assert results == [("of a pool: the caller is a thread of a team itself", True)], results
        assert launched == {"pool"}, launched
        assert right() and launched == {"pool", "team"} and threads.describe() == "torch's own"
    """)


@pytest.mark.slow
def test_changes_of_the_number_of_threads():
    run("""
        launched = shared_out("team")
        threads = sys.modules["lstmcore.kernels.cpu.threads"]
        threads._cores = lambda: 8
        for count in (2, 7, 1, 3, 8, 2, 5, 1, 4):
            torch.set_num_threads(count)
            torch.randn(1 << 18).exp_()
            assert right() and torch.get_num_threads() == count
    """)


@pytest.mark.slow
def test_python_threads_at_once():
    """Each has a team of its own; who finds a launch running computes alone."""
    run("""
        launched = shared_out("team")
        wrong = []
        def several():
            torch.set_num_threads(2)  # of this thread
            for _ in range(5):
                if not right(): wrong.append(threading.current_thread().name)
        each = [threading.Thread(target=several) for _ in range(6)]
        for t in each: t.start()
        for t in each: t.join()
        assert not wrong and launched == {"team"}, (wrong, launched)
    """)


@pytest.mark.slow
def test_a_forked_child():
    """The team stays with the parent."""
    run("""
        launched = shared_out("team")
        threads = sys.modules["lstmcore.kernels.cpu.threads"]
        small = dict(T=40, B=16, H=32)  # nothing that torch itself would share out, and hang
        expected = work(**small)
        assert launched == {"team"}
        def in_child():
            launched.clear()
            return torch.equal(work(**small), expected) and launched == {"pool"} and "forked" in threads.describe()
        child(in_child)
        assert right() and threads.describe() == "torch's own"
        choice = lstmcore.explain(lstmcore.LSTM(7, 64, backend="numba"), torch.randn(60, 16, 7))
        assert "(2 threads, torch's own)" in str(choice), choice
    """)


@pytest.mark.slow
def test_no_library_no_entry(monkeypatch):
    """A build whose library cannot be opened, and one whose runtime lacks the entry: the pool, and why."""
    in_process("""
        import ctypes
        from lstmcore.kernels.cpu import team, threads
        class Empty:
            pass
        for library, why in ((lambda path: Empty(), "no OpenMP runtime"), (None, "cannot be opened")):
            def opened(path):
                if library is None: raise OSError("not there")
                return library(path)
            team._load.cache_clear()
            team.ctypes = type("", (), {"CDLL": staticmethod(opened)})
            assert why in threads.describe(), threads.describe()
        torch.set_num_threads(2)
        threads._cores = lambda: 2
        got = work(T=60, B=16, H=64)
        assert threads._workers
        torch.set_num_threads(1)
        assert torch.equal(work(T=60, B=16, H=64), got)
    """)
