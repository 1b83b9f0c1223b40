"""Exceptions that strike at any moment, as signal handlers raise them: no hang, none lost, the next result right."""

from __future__ import annotations

import pytest

from ..support.processes import PRELUDE, in_process, run_program

pytestmark = pytest.mark.serial

SETUP = """
import random, time
from lstmcore.kernels.cpu import threads

class Path:
    # one way through the kernels' host code, on two threads
    def __init__(self, options, T, B, I, packed, trains):
        self.packed, self.trains = packed, trains
        self.module = lstmcore.LSTM(I, **{{"hidden_size": 64}} | options, backend="numba")
        self.x = torch.randn(T, B, I, requires_grad=trains)
        self.lengths = torch.arange(B, 0, -1) * T // B
        launched.clear()
        self.expected = self.run()
        assert torch.equal(self.run(), self.expected)
        assert launched == {{"{threads_of}"}}, "the work was not shared out: the test shows nothing"

    def run(self):
        with torch.set_grad_enabled(self.trains):
            x = self.x
            output, (h_n, c_n) = self.module(
                torch.nn.utils.rnn.pack_padded_sequence(x, self.lengths) if self.packed else x)
            output = output.data if self.packed else output
            loss = output.sum() + c_n.sum()
            grads = torch.autograd.grad(loss, [x, *self.module.parameters()]) if self.trains else ()
        return torch.cat([t.detach().flatten() for t in (output, h_n, c_n, *grads)])

    def check(self, when):
        assert torch.equal(self.run(), self.expected), when
        assert threads.available(2) == 2, f"the pool was lost: {{when}}"

launched = shared_out("{threads_of}")
PATHS = {{
    "inference": Path({{}}, 60, 8, 16, False, False),
    "training": Path({{}}, 60, 8, 16, False, True),
    "directions": Path({{"bidirectional": True}}, 60, 8, 16, False, True),
    "lockstep": Path({{"hidden_size": 256}}, 20, 1, 16, False, True),
    "packed": Path({{}}, 60, 8, 16, True, True),
    "projection": Path({{"proj_size": 24, "num_layers": 2}}, 40, 8, 16, False, True),
    "segments": Path({{"recompute": 17}}, 60, 8, 16, False, True),
    "waves": Path({{"num_layers": 4}}, 400, 1, 16, False, True),
}}
"""


def on_every_path(program: str, threads_of: str) -> None:
    """Runs ``program``, which defines strike_at(path), with each path, all in one process."""
    each = "for name, path in PATHS.items():\n    print(name, flush=True)\n    strike_at(path)\n"
    run_program(PRELUDE + SETUP.format(threads_of=threads_of) + program + each)


SIGNALS = """
class Struck(BaseException):
    pass

def strike(number, frame):
    global raised
    while armed and frame is not None:
        if frame.f_code is Path.run.__code__:  # not in what follows, which several may strike
            raised = True
            raise Struck(number)
        frame = frame.f_back

signals = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
for each in signals:
    signal.signal(each, strike)
delays, armed, raised = __import__("queue").SimpleQueue(), False, False

def press():
    while True:
        attempt, delay = delays.get()
        time.sleep(delay)
        for number in range(attempt, attempt + (1 if attempt % 2 else 3)):
            os.kill(os.getpid(), signals[number % 3])

threading.Thread(target=press, daemon=True).start()

def strike_at(path):
    global armed, raised
    start = time.perf_counter(); path.run(); duration = time.perf_counter() - start
    struck = [0, 0]  # by three at once, by one
    for attempt in range(3000):
        raised, armed = False, True
        try:
            delays.put((attempt, random.uniform(0, 1.2 * duration)))
            start = time.perf_counter(); path.run(); took = time.perf_counter() - start
            armed = False
        except Struck:
            armed = False
            struck[attempt % 2] += 1
            path.check(f"interruption {struck}")
        else:
            assert not raised, "an exception was lost"
            duration += 0.2 * (took - duration)  # on a busy machine, the first run says little of those to come
        if min(struck) >= 150:
            break
    assert min(struck) >= 150, struck
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads_of", ["team", "pool"])
def test_three_hundred_signals(threads_of):
    """SIGINT, SIGTERM and SIGALRM by turns, whose handlers raise, from before a call until after it.

    One by one, and three at once, which strike what cleans up after the first, too.
    """
    on_every_path(SIGNALS, threads_of)


LINES = """
here = os.path.dirname(threads.__file__) + os.sep

class Struck(BaseException):
    pass

def lines(path, see):
    # runs; before each line of the host code calls see(line, how often it has run before)
    seen = {}
    def local(frame, event, argument):
        if event == "line":
            line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            seen[line] = seen.get(line, -1) + 1
            see(line, seen[line])
        return local
    sys.settrace(lambda frame, event, argument: local if frame.f_code.co_filename.startswith(here) else None)
    try:
        path.run()
    finally:
        sys.settrace(None)
    return seen

def strike_at(path):
    places = {(line, when) for line, last in lines(path, lambda line, times: None).items() for when in (0, last)}
    assert len(places) > 100, "hardly a line was seen"
    struck = 0
    for place in sorted(places):
        def strike(line, times):
            if (line, times) == place:
                raise Struck
        try:
            lines(path, strike)
        except Struck:
            struck += 1
            path.check(place)
    assert struck > 0.9 * len(places)  # what memory is there to be reused is not the same each time
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads_of", ["team", "pool"])
def test_an_exception_at_every_line(threads_of):
    """Of the kernels' host code, one after the other, in forward and backward: the first time it runs, and the last."""
    on_every_path(LINES, threads_of)


def test_a_member_that_cannot_start():
    """On the pool, for want of memory, say: the others, who would wait for it, end too, and its error is raised."""
    in_process("""
        import numpy as np
        from lstmcore.kernels.cpu import threads
        from lstmcore.kernels.cpu.jit import kernel
        from lstmcore.kernels.cpu.memory import load_int
        from lstmcore.kernels.cpu.sync import arrive_and_wait

        @kernel("test")
        def meet(address):
            arrive_and_wait(load_int(address + 8), 2, 1)

        def member(address):
            if number[address] == failing:
                raise MemoryError("none left")
            meet(address)

        shared_out("pool")
        for failing in (0, None, 0, 1, None, 1):
            counters = np.zeros((1, 16), np.int64)
            records = np.array([(m, counters.ctypes.data) for m in range(2)], np.int64)
            addresses = [records.ctypes.data, records.ctypes.data + 16]
            number = dict(zip(addresses, range(2)))
            assert threads.available(2) == 2
            try:
                threads._run_on_pool(member, addresses, counters)
                assert failing is None
            except MemoryError as error:
                assert failing is not None and "none left" in str(error)
        expected = work()
        assert torch.equal(work(), expected)
    """)


@pytest.mark.slow
def test_a_member_that_cannot_be_handed_out():
    """On the pool, for want of memory: those that have begun end, the others never begin, and the pool goes on."""
    in_process("""
        from types import SimpleNamespace
        from lstmcore.kernels.cpu import threads
        launched = shared_out("pool")
        threads._cores = lambda: 3
        torch.set_num_threads(3)
        job = dict(T=40, B=1, H=256)  # in lockstep
        expected = work(**job)
        assert len(threads._workers) == 2

        def put(message):
            raise MemoryError("none left")

        for failing in [0] * 50 + [1] * 50:
            worker = threads._workers[failing]
            inbox = worker.inbox
            worker.inbox = SimpleNamespace(put=put, get=inbox.get)
            try:
                work(**job)
                raise AssertionError("no error")
            except MemoryError as error:
                assert "none left" in str(error)
            finally:
                worker.inbox = inbox
            assert torch.equal(work(**job), expected) and threads.available(3) == 3
    """)


@pytest.mark.slow
@pytest.mark.parametrize("threads_of", ["team", "pool"])
def test_at_the_end_of_the_process(threads_of):
    """Functions of atexit, and what is deleted last, can still call a module."""
    in_process(f"""
        import atexit
        launched = shared_out("{threads_of}")
        module, x = build(H=64, T=60, B=16)
        expected = step(module, x)
        assert launched == {{"{threads_of}"}}

        class Last:
            def __del__(self, step=step, equal=torch.equal, module=module, x=x, expected=expected, end=os._exit):
                if not equal(step(module, x), expected):
                    end(1)

        last = Last()
        sys.modules["kept until the end"] = last
        atexit.register(lambda: torch.equal(step(module, x), expected) or os._exit(1))
    """)
