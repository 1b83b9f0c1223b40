"""Programs that run in a process of their own, with a hard limit: a hang is a failure, not a wait."""

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

def shared_out(threads_of):
    # from here on two threads share out what is worth it, those of torch's team, or those of the pool as where there
    # is no team; the value says whose launches have run
    from lstmcore.kernels.cpu import team, threads
    torch.set_num_threads(2)
    threads._cores = lambda: 2
    if threads_of == "pool":
        team._load = lambda: "there is none in this test"
    launched, launch, on_pool = set(), team.Launch, threads._run_on_pool
    team.Launch = lambda *given: launched.add("team") or launch(*given)
    threads._run_on_pool = lambda *given: launched.add("pool") or on_pool(*given)
    return launched

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


def in_process(code: str, **environment: str | None) -> None:
    """Runs ``code`` after the prelude; fails with its output when it fails or takes too long."""
    run_program(PRELUDE + textwrap.dedent(code), **environment)


def run_program(program: str, **environment: str | None) -> str:
    """Runs ``program`` and returns what it prints; fails with that when it fails or takes too long.

    ``environment``: variables to change; None takes one out.  Threads of OpenMP sleep while they wait, unless that is
    changed: of themselves they spin, and beside another process on the same cores a launch takes many times as long.
    """
    command = [sys.executable, "-c", program + "\nprint('done')\n"]
    changed = {**os.environ, "OMP_WAIT_POLICY": "passive", **environment}
    given = {name: value for name, value in changed.items() if value is not None}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=given)
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"hung for {LIMIT:.0f} s\n{expired.stdout}\n{expired.stderr}")
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip().endswith("done")
    return done.stdout
