"""Threads, forks, workers and greenlets, each in a process of its own."""

from __future__ import annotations

import os
import sys

import pytest

from ..support.processes import PRELUDE, in_process, run_program

pytestmark = pytest.mark.serial
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason=f"{sys.platform} cannot fork")


@pytest.mark.parametrize("first", [pytest.param("cold", marks=pytest.mark.slow), "warm"])
def test_two_threads_at_once(first):
    """Each thread gets the bits that it would get alone; also when the very first call of the process is in threads."""
    in_process(f"""
        jobs = [dict(seed=0), dict(seed=1, H=64, bidirectional=True), dict(seed=2, B=1), dict(seed=3, num_layers=2)]
        expected = [work(**job) for job in jobs] if {first == "warm"} else None
        barrier, found = threading.Barrier(len(jobs)), {{}}
        def run(k):
            barrier.wait()
            found[k] = [work(**jobs[k]) for _ in range(15)]
        threads = [threading.Thread(target=run, args=(k,)) for k in range(len(jobs))]
        for t in threads: t.start()
        for t in threads: t.join()
        expected = expected or [work(**job) for job in jobs]
        for k, job in enumerate(jobs):
            assert len(found[k]) == 15
            assert all(torch.equal(result, expected[k]) for result in found[k]), job
    """)


@pytest.mark.slow
def test_number_of_threads_changes_while_in_use():
    in_process("""
        expected, stop, wrong = work(), threading.Event(), []
        def run():
            while not stop.is_set():
                if not torch.equal(work(), expected):
                    wrong.append(1)
        threads = [threading.Thread(target=run) for _ in range(2)]
        for t in threads: t.start()
        for n in [1, 2, 3, 4, 1, 4, 2] * 5:
            torch.set_num_threads(n)
            assert torch.equal(work(), expected)
        stop.set()
        for t in threads: t.join()
        assert not wrong
    """)


@pytest.mark.slow
def test_an_error_in_a_thread_leaves_the_pool_usable():
    in_process("""
        expected, errors = work(), []
        def run():
            try:
                lstmcore.LSTM(7, 33, backend="numba")(torch.randn(4, 2, 8))
            except RuntimeError as error:
                errors.append(error)
        threads = [threading.Thread(target=run) for _ in range(3)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert len(errors) == 3
        assert torch.equal(work(), expected)
    """)


@pytest.mark.slow
def test_a_call_inside_a_backward():
    """Nested: a hook of the outer backward runs another forward and backward."""
    in_process("""
        expected, found = work(seed=5), []
        x = torch.randn(6, 3, 7)
        module = lstmcore.LSTM(7, 33, 2, bidirectional=True, backend="numba")
        output, _ = module(x)
        outer = torch.autograd.grad(output.sum(), module.parameters())
        output, _ = module(x)
        output.register_hook(lambda grad: found.append(work(seed=5)))
        again = torch.autograd.grad(output.sum(), module.parameters())
        assert torch.equal(found[0], expected)
        assert all(map(torch.equal, outer, again))
    """)


@pytest.mark.slow
def test_backward_in_another_thread():
    in_process("""
        expected, found = work(seed=5), []
        module, x = lstmcore.LSTM(7, 33, backend="numba"), torch.randn(6, 3, 7)
        expected = torch.autograd.grad(module(x)[0].square().sum(), module.parameters())
        loss = module(x)[0].square().sum()
        thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, module.parameters())))
        thread.start(); thread.join()
        assert all(map(torch.equal, found, expected))
    """)


@pytest.mark.slow
@needs_fork
def test_forked_child_after_use_in_the_parent():
    in_process("""
        def grandchild():
            child(lambda: torch.equal(work(), expected))
            return torch.equal(work(), expected)

        for count in (1, 2, 4):
            torch.set_num_threads(count)
            expected = work()
            for _ in range(3):
                child(lambda: torch.equal(work(), expected))
                assert torch.equal(work(), expected)
            child(grandchild)
    """)


@pytest.mark.slow
@needs_fork
def test_auto_in_a_forked_child():
    """Of a parent that has used torch's threads: short calls, long ones, large ones, cells; and the choice is told."""
    in_process("""
        torch.set_num_threads(2)
        cases = [(lstmcore.LSTM(48, 48, bidirectional=B > 8), T, B) for T in (1, 20, 60, 300) for B in (8, 64)]
        cases += [(lstmcore.LSTM(48, 48, 2, proj_size=8, batch_first=True), 64, 64)]
        cell = lstmcore.LSTMCell(48, 48)

        def train(module, *given):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in given]
                results = module(*leaves)
                output = results[0]
            # nothing of the loss is shared out among torch's threads: the model's own operations are not at issue
            grads = torch.autograd.grad(output, [*leaves, *module.parameters()], torch.ones(()).expand_as(output))
            return [output.detach(), *grads]

        def close(got, expected):
            return all(np.allclose(g.numpy(), e.numpy(), atol=1e-3) for g, e in zip(got, expected))

        import numpy as np
        inputs = [torch.randn(T, B, 48) for _, T, B in cases]
        expected = [train(module, x) for (module, *_), x in zip(cases, inputs)]
        one_step = torch.randn(8, 48)
        expected_step = train(cell, one_step)
        packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(5, 4, 48), torch.tensor([5, 4, 2, 1]))
        assert lstmcore.explain(cell, one_step).name == lstmcore.explain(cases[0][0], inputs[0]).name == "torch"

        def answers():
            for (module, *_), x, right in zip(cases, inputs, expected):
                choice = lstmcore.explain(module, x)
                assert choice.name == "numba" and "forked child" in str(choice), choice
                assert close(train(module, x), right)
            assert lstmcore.explain(cell, one_step).name == "numba"
            assert close(train(cell, one_step), expected_step)
            with torch.no_grad():
                cases[0][0](packed)
            assert torch.get_num_threads() == 2
            torch.set_num_threads(1)  # as in the workers of a DataLoader: now torch is safe, too
            assert lstmcore.explain(cell, one_step).name == "torch"
            return close(train(cell, one_step), expected_step) and close(train(cases[0][0], inputs[0]), expected[0])

        child(answers)
        assert lstmcore.explain(cell, one_step).name == "torch"
    """)


@pytest.mark.slow
@needs_fork
def test_fork_while_other_threads_compute():
    """Whatever a lock of the parent's pool said at the fork, the child has its own.

    The threads' modules are built beforehand: torch initialises parameters under the lock of its default generator and
    without the GIL, so a child forked just then inherits that lock taken and waits for ever in its own initialisation.
    """
    in_process("""
        expected, other, stop = work(), build(seed=1, H=64, T=40), threading.Event()
        def run():
            while not stop.is_set():
                step(*other)
        threads = [threading.Thread(target=run) for _ in range(2)]
        for t in threads: t.start()
        try:
            for _ in range(10):
                child(lambda: torch.equal(work(), expected))
        finally:
            stop.set()
        for t in threads: t.join()
    """)


@pytest.mark.slow
@needs_fork
def test_multiprocessing_pool():
    in_process("""
        import multiprocessing
        expected = [work(seed=s) for s in range(4)]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for got, value in zip(pool.map_async(work, range(4)).get(60), expected):
                assert torch.equal(got, value)
    """)


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("used_before", [False, True])
def test_dataloader_workers(used_before):
    """Workers, in which torch sets one thread, compute what the parent computes."""
    in_process(f"""
        class Data(torch.utils.data.Dataset):
            def __len__(self): return 6
            def __getitem__(self, k): return work(seed=k)
        expected = [work(seed=k) for k in range(6)] if {used_before} else None
        loader = torch.utils.data.DataLoader(
            Data(), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork", persistent_workers=True)
        for _ in range(2):
            found = list(loader)
        for k in range(6):
            assert torch.equal(found[k], expected[k] if expected else work(seed=k))
    """)


@pytest.mark.slow
def test_the_process_ends():
    """Idle threads of the pool, started by the main thread and by others, do not keep the interpreter from ending."""
    in_process("""
        work()
        threads = [threading.Thread(target=work) for _ in range(2)]
        for t in threads: t.start()
    """)


GREENLETS = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
    "something": """
import _thread, queue, threading
def start(*given): raise AssertionError("a thread that is none")
_thread.start_new_thread = threading._start_new_thread = queue.SimpleQueue = start
""",
}
SHARED_OUT = """
launched = shared_out("{threads_of}")
jobs = [dict(T=60, B=16, H=64), dict(T=60, B=16, H=64, bidirectional=True), dict(T=20, B=1, H=256)]  # that in lockstep
expected = [work(seed=k, **job) for k, job in enumerate(jobs)]
assert launched == {{"{threads_of}"}}, launched
torch.set_num_threads(1)
assert all(torch.equal(work(seed=k, **job), expected[k]) for k, job in enumerate(jobs))
torch.set_num_threads(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("library", GREENLETS)
@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("threads_of", ["team", "pool"])
def test_patched_threads(library, when, threads_of):
    """Greenlets in the place of threads, patched before lstmcore is imported, or between that and its first call."""
    if library != "something":
        pytest.importorskip(library)
    patch, load = GREENLETS[library], "import torch, lstmcore"
    first = [patch, load] if when == "before" else [load, patch]
    run_program("\n".join([*first, PRELUDE, SHARED_OUT.format(threads_of=threads_of)]))


@pytest.mark.slow
@pytest.mark.parametrize("threads_of", ["team", "pool"])
def test_greenlets_of_a_server(threads_of):
    """What gunicorn's workers do: many greenlets call at once, other native threads beside them."""
    pytest.importorskip("gevent")
    run_program(
        GREENLETS["gevent"]
        + PRELUDE
        + SHARED_OUT.format(threads_of=threads_of)
        + """
import gevent
from gevent.threadpool import ThreadPool
def run(k): return torch.equal(work(seed=k, **jobs[k]), expected[k])
assert all(each.get() for each in [gevent.spawn(run, k % 3) for k in range(12)])
pool = ThreadPool(3)
assert all(each.get() for each in [pool.spawn(run, k % 3) for k in range(12)])
"""
    )


@pytest.mark.slow
def test_no_native_threads_at_all():
    """Then one thread computes, where there is no team of torch's."""
    in_process("""
        from lstmcore.kernels.cpu import process, threads
        process._start_new_thread = lambda *given: None
        launched = shared_out("pool")
        assert threads.available(2) == 1
        got = work(T=60, B=16, H=64)
        torch.set_num_threads(1)
        assert torch.equal(work(T=60, B=16, H=64), got)
    """)
