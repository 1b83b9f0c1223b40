"""Threads, forks and workers, each in a process of its own with a hard limit: a hang is a failure, not a wait."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

LIMIT = 120.0  # seconds, compilation included

PRELUDE = """
import faulthandler, os, signal, sys, threading
faulthandler.dump_traceback_later(100, exit=True)  # says where it hangs
import torch
import lstmcore

def build(seed=0, H=33, T=12, B=9, dtype=torch.float32, **options):
    # a module and an input for it
    g = torch.Generator().manual_seed(seed)
    module = lstmcore.LSTM(7, H, **options, dtype=dtype, backend="numba")
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return module, torch.randn(T, B, 7, generator=g).to(dtype).requires_grad_()

def step(module, x):
    # outputs and gradients of one training step, as one flat tensor
    with torch.enable_grad():  # also inside a hook of a backward
        output, (h_n, c_n) = module(x)
        loss = output.square().sum() + c_n.sum()
    grads = torch.autograd.grad(loss, [x, *module.parameters()])
    return torch.cat([t.detach().flatten() for t in (output, h_n, c_n, *grads)])

def work(seed=0, **options):
    return step(*build(seed, **options))

def child(function):
    # function() in a forked child; its exit status, or an error when it takes too long
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(25)  # the default action ends the child
            status = 0 if function() else 3
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with status {status}: " + (
        "it hung" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else "it failed")
"""


def in_process(code: str) -> None:
    """Runs ``code`` after the prelude; fails with its output when it fails or takes too long."""
    program = PRELUDE + textwrap.dedent(code) + "\nprint('done')\n"
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"hung for {LIMIT:.0f} s\n{expired.stdout}\n{expired.stderr}")
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip().endswith("done")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason=f"{sys.platform} cannot fork")


@pytest.mark.parametrize("first", ["cold", "warm"])
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


@needs_fork
@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_forked_child_after_use_in_the_parent(n_threads):
    in_process(f"""
        torch.set_num_threads({n_threads})
        expected = work()
        for _ in range(3):
            child(lambda: torch.equal(work(), expected))
            assert torch.equal(work(), expected)
        def grandchild():
            child(lambda: torch.equal(work(), expected))
            return torch.equal(work(), expected)
        child(grandchild)
    """)


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


@needs_fork
def test_multiprocessing_pool():
    in_process("""
        import multiprocessing
        expected = [work(seed=s) for s in range(4)]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for got, value in zip(pool.map_async(work, range(4)).get(60), expected):
                assert torch.equal(got, value)
    """)


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


def test_the_process_ends():
    """Idle threads of the pool, started by the main thread and by others, do not keep the interpreter from ending."""
    in_process("""
        work()
        threads = [threading.Thread(target=work) for _ in range(2)]
        for t in threads: t.start()
    """)
