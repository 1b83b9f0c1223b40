"""What the surroundings of a process may take away: memory, Numba's compiler, the first import."""

from __future__ import annotations

import sys

import pytest

from ..support.processes import in_process

pytestmark = [pytest.mark.serial, pytest.mark.slow]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process like this")
@pytest.mark.parametrize("trains", [False, True])
def test_out_of_memory(trains):
    """The type and the words of torch, for which those look who search a batch size; and less still fits then."""
    in_process(f"""
        import resource
        trains = {trains}
        torch.set_num_threads(1)
        ours, theirs = lstmcore.LSTM(8, 256, backend="numba"), torch.nn.LSTM(8, 256)

        def run(module, B, T=1000):
            with torch.set_grad_enabled(trains):
                output, _ = module(torch.randn(T, B, 8))
                if trains:
                    output.sum().backward()

        for module in (ours, theirs):
            run(module, 2)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), -1))
        texts = []
        for module in (theirs, ours):
            B = 1024  # is halved, as a finder of batch sizes does
            while True:
                try:
                    run(module, B)
                    break
                except RuntimeError as error:
                    texts.append(str(error))
                    assert type(error) is RuntimeError and len(error.args) == 1
                    B //= 2
            assert 4 <= B < 1024, B  # the first did not fit, and what failed left room for the last
        common = "DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        assert all(common in text for text in texts), texts
    """)


def test_out_of_memory_gives_back_what_is_not_used():
    """Before it raises, and only then."""
    in_process("""
        import numpy as np
        from lstmcore.kernels.cpu import buffers
        kept = buffers.take(50_000_000, torch.uint8)
        del kept
        assert sum(each.memory.nbytes for each in buffers._buffers) >= 50_000_000
        original, asked = np.empty, []

        def empty(size, dtype):
            asked.append(size)
            raise MemoryError
        np.empty = empty
        got = buffers.take(200_000_000, torch.uint8)  # torch finds it
        assert len(got) == 200_000_000 and len(asked) == 1
        assert sum(each.memory.nbytes for each in buffers._buffers) < 250_000_000
    """)


def test_buffers_are_used_again():
    """As long as nobody holds them, and within the limit."""
    in_process("""
        from lstmcore.kernels.cpu import buffers
        buffers.LIMIT, size = 1_000_000, 300_000
        def total(): return sum(each.memory.nbytes for each in buffers._buffers)
        first = buffers.take(size, torch.uint8)
        address, view = first.data_ptr(), first[10:].view(-1)
        del first
        second = buffers.take(size, torch.uint8)
        assert second.data_ptr() != address  # a view holds it
        del view
        third = buffers.take(size, torch.uint8)
        assert third.data_ptr() == address
        assert total() == 2 * size
        many = [buffers.take(size, torch.uint8) for _ in range(9)]
        assert total() <= buffers.LIMIT
        assert len({each.data_ptr() for each in (second, third, *many)}) == 11
        assert not any(each.data_ptr() % 64 for each in many)
        del many, second, third
        large = buffers.take(900_000, torch.uint8)  # the free ones make room
        assert total() == 900_000
        del large
        assert total() == 900_000
        buffers.clear()
        assert total() == 0
        small = buffers.take(10, torch.float64)
        assert len(small) == 10 and total() == 0
    """)


def test_numba_without_its_compiler():
    """NUMBA_DISABLE_JIT=1, set by people who debug other code: "auto" runs something else, "numba" says why not."""
    in_process(
        """
        module, x = lstmcore.LSTM(8, 32, backend="auto"), torch.randn(300, 4, 8)
        choice = lstmcore.explain(module, x)
        assert choice.name == "torch" and "NUMBA_DISABLE_JIT" in str(choice), choice
        module(x)[0].sum().backward()
        assert module(x, lengths=[300, 2, 0, 7])[0].shape == (300, 4, 32)  # the reference
        module = lstmcore.LSTM(8, 32, backend="numba")
        for run in (module, lambda x: lstmcore.explain(module, x)):
            try:
                run(x)
                raise AssertionError("it ran")
            except RuntimeError as error:
                assert "switched off" in str(error) and "unset NUMBA_DISABLE_JIT" in str(error), error
        """,
        NUMBA_DISABLE_JIT="1",
    )


def test_imported_again():
    """After it was removed from sys.modules, as notebooks do: modules of both imports compute, and so do operators."""
    in_process("""
        def forget():
            for name in [name for name in sys.modules if name.split(".")[0] == "lstmcore"]:
                del sys.modules[name]

        def results(package):
            torch.manual_seed(0)
            module, x = package.LSTM(7, 33, bidirectional=True, backend="numba"), torch.randn(30, 4, 7)
            output = module(x)[0]
            grads = torch.autograd.grad(output.square().sum(), list(module.parameters()))
            mapped = torch.vmap(lambda each: module(each)[0])(x.expand(2, *x.shape))
            compiled = torch.compile(module, fullgraph=True, backend="eager")(x)[0]
            return [output, *grads, mapped, compiled]

        first, expected = lstmcore, results(lstmcore)
        for _ in range(2):
            forget()
            import lstmcore
            assert lstmcore is not first
            for package in (lstmcore, first):
                assert all(map(torch.equal, results(package), expected))
    """)
