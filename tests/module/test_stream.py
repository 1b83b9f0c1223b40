"""A module step by step: the bits of one long run, however it is divided, and what can go wrong between the steps."""

from __future__ import annotations

import copy
import pickle
import threading
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from lstmcore.kernels.cpu import buffers, threads
from lstmcore.kernels.cpu.problem import multiples
from torch import nn
from torch.nn.utils import parametrize, prune

import lstmcore

from ..support.modules import close
from ..support.processes import in_process
from ..support.tolerances import assert_library

T = 7
SHAPES = {  # B, I, and the module's options
    "one_value": (1, 1, {"hidden_size": 1}),
    "unbatched": (None, 5, {"hidden_size": 17, "num_layers": 2}),
    "odd": (9, 17, {"hidden_size": 129}),
    "no_bias": (2, 1, {"hidden_size": 33, "bias": False, "num_layers": 2}),
    "rows_first": (3, 20, {"hidden_size": 16, "batch_first": True, "num_layers": 3}),
    "projected": (7, 4, {"hidden_size": 33, "proj_size": 18, "num_layers": 3}),
    "dropout": (2, 3, {"hidden_size": 8, "num_layers": 2, "dropout": 0.9}),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BACKENDS = ["numba", "reference"]  # the compiled steps, and ordinary calls


def problem(shape: str, dtype: torch.dtype = torch.float32) -> tuple[lstmcore.LSTM, torch.Tensor]:
    """A module, and the steps of its stream: T tensors (B, I) or (I,)."""
    batch, inputs, options = SHAPES[shape]
    module = lstmcore.LSTM(inputs, **options, dtype=dtype, backend="numba")
    return module, torch.randn(T, *(() if batch is None else (batch,)), inputs, dtype=dtype)


def sequence(module: nn.LSTM, x: torch.Tensor) -> torch.Tensor:
    """Steps (T, B, ·) as the module takes them and gives them back."""
    return x.transpose(0, 1) if module.batch_first and x.dim() == 3 else x


def long_run(module, x: torch.Tensor, **given) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """(T, B, P) and the states of one call without dropout."""
    with torch.no_grad():
        output, states = module.eval()(sequence(module, x), **given)
    return sequence(module, output), states


def same(got, expected) -> None:
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_and_chunks_are_one_long_run(shape, dtype):
    module, x = problem(shape, dtype)
    stream = lstmcore.Stream(module.train(), SHAPES[shape][0])
    assert stream.backend == "numba"
    got = [stream.step(x[0]).clone(), stream.step(x[1]).clone()]
    for begin, end in ((2, 5), (5, 6), (6, 7)):
        chunk = sequence(module, stream.chunk(sequence(module, x[begin:end])))
        got += list(chunk.clone())
    expected, states = long_run(module, x)
    same(torch.stack(got), expected)
    for one, other in zip(stream.state, states, strict=True):
        same(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_torchs_module_in_float64(shape, backend):
    batch, inputs, options = SHAPES[shape]
    theirs, x = nn.LSTM(inputs, **options, dtype=torch.float64).eval(), problem(shape, torch.float64)[1]
    stream = lstmcore.Stream(theirs, batch, backend=backend)
    assert stream.backend == backend
    expected, states = long_run(theirs, x)
    got = [stream.step(step).clone() for step in x[:3]]
    got += list(sequence(theirs, stream.chunk(sequence(theirs, x[3:]))).clone())
    close(torch.stack(got), expected)
    for one, other in zip(stream.state, states, strict=True):
        close(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ordinary_calls_are_the_compiled_steps(dtype):
    """But for what a state of 16 bits loses between calls."""
    module, x = problem("rows_first", dtype)
    compiled, plain = (lstmcore.Stream(module, 3, backend=backend) for backend in BACKENDS)
    for step in x:
        assert_library(plain.step(step), compiled.step(step))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [nn.LSTMCell, lstmcore.LSTMCell])
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind, batch, bias, backend):
    cell, shape = kind(5, 17, bias=bias, dtype=torch.float64), () if batch is None else (batch,)
    stream, state = lstmcore.Stream(cell, batch, backend=backend), None
    for _ in range(3):
        x = torch.randn(*shape, 5, dtype=torch.float64)
        state = cell(x, state)
        close(stream.step(x), state[0].detach())
    for got, expected in zip(stream.state, state, strict=True):
        close(got, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_arrays_in_and_out(dtype):
    module, x = problem("rows_first", dtype)
    stream, arrays = lstmcore.Stream(module, 3), x.numpy()
    got = [stream.step(arrays[0]).copy(), stream.step(np.asfortranarray(arrays[1])).copy()]
    rest = stream.chunk(arrays[2:].swapaxes(0, 1))
    assert type(got[0]) is type(rest) is np.ndarray
    same(torch.from_numpy(np.stack([*got, *rest.swapaxes(0, 1)])), long_run(module, x)[0])


def test_inputs_of_any_strides():
    module, x = problem("odd")
    wide = torch.randn(9, 40)
    wide[:, ::2][:, :17] = x[0]
    expected = lstmcore.Stream(module, 9).step(x[0]).clone()
    views = [wide[:, :34:2], x[0].T.contiguous().T, x[0][:, None].expand(9, 2, 17)[:, 1], torch._neg_view(-x[0])]
    for view in views:
        same(lstmcore.Stream(module, 9).step(view), expected)
    same(lstmcore.Stream(module, 9).step(x[0].clone().requires_grad_()), expected)
    array = lstmcore.Stream(module, 9).step(wide.numpy()[:, :34:2])
    same(torch.from_numpy(array), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["rows_first", "projected", "unbatched"])
def test_resets(shape, backend):
    """In steps, in chunks, and between calls: what ``reset`` of a long run does."""
    module, x = problem(shape, torch.float64)
    mask = torch.rand(x.shape[:-1]) < 0.4
    expected, states = long_run(module, x, reset=sequence(module, mask[..., None])[..., 0])
    stream = lstmcore.Stream(module, SHAPES[shape][0], backend=backend)
    got = [stream.step(x[0], reset=mask[0]).clone()]
    got.append(stream.step(x[1], reset=mask[1].numpy()).clone())
    stream.reset(mask[2] if x.dim() == 3 else [0] * int(mask[2]))
    got.append(stream.step(x[2]).clone())
    rest = sequence(module, mask[3:, ..., None])[..., 0]
    got += list(sequence(module, stream.chunk(sequence(module, x[3:]), reset=rest)).clone())
    close(torch.stack(got), expected)
    for one, other in zip(stream.state, states, strict=True):
        close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_by_index(backend):
    module, x = problem("projected")
    stream = lstmcore.Stream(module, 7, backend=backend)
    stream.step(x[0])
    before = stream.state
    stream.reset([0, -1, 2])
    for got, was in zip(stream.state, before, strict=True):
        assert not got[:, [0, 2, 6]].any()
        same(got[:, [1, 3, 4, 5]], was[:, [1, 3, 4, 5]])
    stream.reset()
    assert not any(each.any() for each in stream.state)
    same(stream.step(x[0]).clone(), lstmcore.Stream(module, 7, backend=backend).step(x[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["projected", "unbatched"])
def test_state_is_read_and_set(shape, backend):
    module, x = problem(shape)
    stream, other = (lstmcore.Stream(module, SHAPES[shape][0], backend=backend) for _ in range(2))
    for step in x[:3]:
        stream.step(step)
    kept = stream.state
    after = stream.step(x[3]).clone()
    other.state = kept[0].numpy(), kept[1].mT.contiguous().mT
    same(other.step(x[3]), after)
    same(stream.chunk(sequence(module, x[:1])).clone(), other.chunk(sequence(module, x[:1])))


def test_results_are_buffers_that_autograd_refuses():
    module, x = problem("odd")
    stream, weight = lstmcore.Stream(module, 9), torch.randn(129, requires_grad=True)
    first = stream.step(x[0])
    kept = first.clone()
    assert not kept.is_inference()
    assert stream.step(x[1]) is first
    assert not torch.equal(first, kept)
    with pytest.raises(RuntimeError, match="clone"):
        (first * weight).sum()
    (kept * weight).sum().backward()
    array = stream.step(x[1].numpy())
    with pytest.raises(ValueError, match="does not own its data"):
        array.resize(1, 1)
    with pytest.raises(RuntimeError, match="not resizable"), torch.inference_mode():
        first.resize_(1000, 1000)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["tensor", "array"])
@pytest.mark.parametrize("layers", [1, 2])
def test_outputs_fed_back(kind, layers, backend):
    """As a model that generates does; also a part of an output, and a chunk."""
    module = lstmcore.LSTM(70, 70, layers, backend="numba")
    x = torch.randn(1, 70) if kind == "tensor" else np.random.default_rng(0).normal(size=(1, 70)).astype(np.float32)
    fed, copied = (lstmcore.Stream(module, 1, backend=backend) for _ in range(2))
    mine, theirs = fed.step(x), copied.step(x)
    for _ in range(5):
        mine, theirs = fed.step(mine), copied.step(torch.as_tensor(theirs).clone())
        same(torch.as_tensor(mine), theirs)
    mine, theirs = fed.chunk(x[None].repeat(4, 0)) if kind == "array" else fed.chunk(x.expand(4, 1, 70)), None
    before = torch.as_tensor(mine).clone()
    copied.chunk(torch.as_tensor(x).expand(4, 1, 70))
    same(torch.as_tensor(fed.chunk(mine)), copied.chunk(before))


def test_a_part_of_an_output_fed_back():
    module = lstmcore.LSTM(33, 70)
    fed, copied = (lstmcore.Stream(module, 1) for _ in range(2))
    mine, theirs = fed.step(torch.ones(1, 33)), copied.step(torch.ones(1, 33))
    for _ in range(3):
        mine, theirs = fed.step(mine[:, 37:]), copied.step(theirs[:, 37:].clone())
        same(mine, theirs)


CHANGES = {
    "optimizer": lambda m: torch.optim.SGD(m.parameters(), 0.1).step(),
    "in place": lambda m: m.weight_hh_l0.detach().mul_(0.5),
    "load": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "data": lambda m: setattr(m.bias_ih_l1, "data", m.bias_ih_l1 + 1),
    "replaced": lambda m: setattr(m, "weight_ih_l0", nn.Parameter(m.weight_ih_l0 + 1)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights(change, backend):
    module, x = problem("rows_first")
    stream = lstmcore.Stream(module, 3, backend=backend)
    stream.step(x[0])
    state = stream.state
    for param in module.parameters():
        param.grad = torch.ones_like(param)
    with torch.no_grad():
        CHANGES[change](module)
    for run in (lambda: stream.step(x[1]), lambda: stream.step(x[1].numpy()), lambda: stream.chunk(x[1][:, None])):
        with pytest.raises(RuntimeError, match=r"weights changed .* update\(\)"):
            run()
    stream.update()
    with torch.no_grad():
        expected, _ = module(x[1][:, None], state)
    close(stream.step(x[1]), expected[:, 0])


def test_parametrized_weights():
    """The weights are computed from other parameters, which are watched."""
    module, x = problem("odd")
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    stream = lstmcore.Stream(module, 9)
    close(stream.step(x[0]), long_run(module, x[:1])[0][0])
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)
    with pytest.raises(RuntimeError, match="changed"):
        stream.step(x[1])
    stream.update()
    stream.reset()
    close(stream.step(x[1]), long_run(module, x[1:2])[0][0])
    nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")
    with pytest.raises(RuntimeError, match="changed"):
        stream.step(x[1])


def test_weights_made_in_inference_mode():
    """They have no version counters."""
    with torch.inference_mode():
        module, x = problem("odd")
        stream = lstmcore.Stream(module, 9)
        got = stream.step(x[0]).clone()
    same(got, long_run(module, x[:1])[0][0])


def test_other_sizes_need_another_stream():
    module, _ = problem("odd")
    stream = lstmcore.Stream(module, 9)
    with pytest.raises(RuntimeError, match="changed"):
        stream.step(torch.zeros(9, 17)) if module.double() else None
    with pytest.raises(RuntimeError, match=r"Expected a parameter of shape .* and torch.float32"):
        stream.update()


MODULES = {
    "bidirectional": (lambda: lstmcore.LSTM(3, 4, bidirectional=True), 1, ValueError, "needs the future"),
    "GRU": (lambda: nn.GRU(3, 4), 1, TypeError, "Expected an LSTM or an LSTMCell, got GRU"),
    "no rows": (lambda: nn.LSTM(3, 4), 0, RuntimeError, "batch should be at least 1, got 0"),
    "half a row": (lambda: nn.LSTM(3, 4), 0.5, TypeError, "batch should be an integer or None, got: 0.5"),
    "another layer's dtype": (
        lambda: setattr(m := lstmcore.LSTM(3, 4, 2), "bias_ih_l1", nn.Parameter(torch.zeros(16).double())) or m,
        1, RuntimeError, "Expected a parameter of shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODULES)
def test_modules_that_do_not_stream(case):
    make, batch, error, words = MODULES[case]
    with pytest.raises(error, match=words):
        lstmcore.Stream(make(), batch)


def test_unknown_backend():
    with pytest.raises(ValueError, match="unknown backend 'cpu'"):
        lstmcore.Stream(nn.LSTM(3, 4), 1, backend="cpu")


INPUTS = {
    "rank": (lambda x: x[None], ValueError, "Expected input to be 2D, got 3D"),
    "unbatched": (lambda x: x[0], ValueError, "Expected input to be 2D, got 1D"),
    "features": (lambda x: x[:, :4], RuntimeError, "Expected 17, got 4"),
    "rows": (lambda x: x[:4], RuntimeError, r"Expected input size \(9, 17\), got \(4, 17\)"),
    "dtype": (lambda x: x.double(), ValueError, "does not match weight dtype"),
    "integers": (lambda x: x.long(), ValueError, "does not match weight dtype"),
    "device": (lambda x: x.to("meta"), RuntimeError, "not at the same device"),
    "sparse": (lambda x: x.to_sparse(), TypeError, "plain dense tensors, got one of layout torch.sparse_coo"),
    "list": (lambda x: x.tolist(), TypeError, "Expected a tensor or an array of NumPy, got list"),
    "array's dtype": (lambda x: x.double().numpy(), ValueError, "does not match weight dtype"),
    "array's bytes": (lambda x: x.numpy().astype(">f4"), ValueError, "does not match weight dtype"),
    "array's rank": (lambda x: x[0].numpy(), ValueError, "Expected input to be 2D, got 1D"),
    "array of objects": (lambda x: np.array([[None] * 17] * 9), ValueError, "does not match weight dtype"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", INPUTS)
def test_wrong_inputs(case, backend):
    module, x = problem("odd")
    stream = lstmcore.Stream(module, 9, backend=backend)
    spoil, error, words = INPUTS[case]
    with pytest.raises(error, match=words):
        stream.step(spoil(x[0]))
    same(stream.step(x[0]).clone(), lstmcore.Stream(module, 9, backend=backend).step(x[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_are_for_modules(backend):
    stream = lstmcore.Stream(problem("odd")[0], 9, backend=backend)
    with pytest.raises(TypeError, match="call the module"):
        torch.vmap(stream.step)(torch.randn(2, 9, 17))


def test_tensors_without_memory():
    """Symbolic zeros, which forward-mode differentiation makes."""
    module, _ = problem("odd")
    expected = lstmcore.Stream(module, 9).step(torch.zeros(9, 17))
    same(lstmcore.Stream(module, 9).step(torch._efficientzerotensor((9, 17))), expected)


def test_streams_are_not_copied():
    stream = lstmcore.Stream(problem("odd")[0], 9)
    for copies in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="set its state"):
            copies(stream)
    assert "batch=9, backend='numba')" in repr(stream)


def test_freed_input():
    module, x = problem("odd")
    stream, freed = lstmcore.Stream(module, 9), x[0].clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="is gone"):
        stream.step(freed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_chunks_masks_rows_and_states(backend):
    module, x = problem("odd")
    stream = lstmcore.Stream(module, 9, backend=backend)
    for run, error, words in (
        (lambda: stream.chunk(x[:0]), RuntimeError, "sequence length to be larger than 0"),
        (lambda: stream.chunk(x[0]), ValueError, "to be 3D, got 2D"),
        (lambda: stream.chunk(x[:, :3]), RuntimeError, "Expected input size"),
        (lambda: stream.chunk([1.0]), TypeError, "Expected a tensor or an array"),
        (lambda: stream.step(x[0], reset=torch.zeros(9)), TypeError, "torch.bool"),
        (lambda: stream.step(x[0], reset=np.zeros(9)), TypeError, "torch.bool"),
        (lambda: stream.step(x[0], reset=[True] * 9), TypeError, "reset should be a tensor"),
        (lambda: stream.step(x[0], reset=torch.zeros(8, dtype=torch.bool)), RuntimeError, "Expected reset size"),
        (lambda: stream.reset([9]), IndexError, "Expected rows from -9 to 8"),
        (lambda: stream.reset(torch.zeros(8, dtype=torch.bool)), IndexError, "Expected a mask of"),
        (lambda: stream.reset([0.5]), TypeError, "indices or bools"),
        (lambda: setattr(stream, "state", x[0]), RuntimeError, "two states"),
        (lambda: setattr(stream, "state", (x[0], x[0])), RuntimeError, "Expected h of shape"),
        (lambda: setattr(stream, "state", [s.double() for s in stream.state]), RuntimeError, "got .* torch.float64"),
    ):
        with pytest.raises(error, match=words):
            run()
    expected = lstmcore.Stream(module, 9, backend=backend).step(x[0])
    same(stream.step(x[0]), expected)


def test_numpy_has_no_bfloat16():
    module, _ = problem("odd", torch.bfloat16)
    with pytest.raises(TypeError, match="NumPy has no bfloat16"):
        lstmcore.Stream(module, 9).step(np.zeros((9, 17), np.float32))


@pytest.mark.serial
@pytest.mark.parametrize(("batch", "hidden"), [(40, 256), (1, 700)])
def test_threads_do_not_change_bits(batch, hidden, monkeypatch):
    """Rows or units divided among two threads; and what one thread computes in between goes on from their state."""
    monkeypatch.setattr(threads, "_cores", lambda: 2)
    module, x = lstmcore.LSTM(256, hidden, 2, proj_size=130, backend="numba"), torch.randn(6, batch, 256)
    mask = torch.rand(6, batch) < 0.3
    before, launched, run = torch.get_num_threads(), [], threads.Repeated.run
    monkeypatch.setattr(threads.Repeated, "run", lambda self: launched.append(self._launch.members) or run(self))
    try:
        torch.set_num_threads(2)
        stream = lstmcore.Stream(module, batch)
        got = [stream.step(x[0], reset=mask[0]).clone(), *stream.chunk(x[1:3], reset=mask[1:3]).clone()]
        assert launched == [2, 2]
        torch.set_num_threads(1)
        got += [stream.step(x[3], reset=mask[3]).clone()]
        assert launched == [2, 2]
        torch.set_num_threads(2)
        got += list(stream.chunk(x[4:], reset=mask[4:]).clone())
        torch.set_num_threads(1)
        same(torch.stack(got), long_run(module, x, reset=mask)[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.serial
def test_several_threads_at_once_harm_nothing():
    """The results are nobody's; afterwards the stream works, and so do the threads."""
    module, x = problem("odd")
    stream, errors = lstmcore.Stream(module, 9), []

    def work(seed: int) -> None:
        try:
            for step in range(200):
                stream.step(torch.randn(9, 17))
                stream.chunk(torch.randn(1 + (step + seed) % 5, 9, 17))
                stream.reset([seed])
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    stream.reset()
    same(stream.step(x[0]), long_run(module, x[:1])[0][0])


def test_denormals_count_as_zero_and_the_mode_stays():
    module, _ = problem("odd")
    stream, tiny = lstmcore.Stream(module, 9), torch.full((9, 17), 1e-40)
    expected = stream.step(torch.zeros(9, 17)).clone()
    stream.reset()
    same(stream.step(tiny), expected)
    assert (tiny * 1.0 == tiny).all()
    assert tiny[0, 0] != 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_poison_stays_in_its_row(value):
    module, x = problem("odd")
    expected = lstmcore.Stream(module, 9).chunk(x).clone()
    stream = lstmcore.Stream(module, 9)
    x[0, 4, 3] = value
    got = stream.chunk(x)
    rows = [r for r in range(9) if r != 4]
    same(got[:, rows], expected[:, rows])
    assert got[:, 4].isnan().any() == long_run(nn.LSTM(17, 129), x)[0][:, 4].isnan().any()
    stream.reset([4])
    assert stream.step(expected.new_zeros(9, 17))[4].isfinite().all()


@pytest.mark.slow
def test_without_numbas_compiler():
    in_process(
        """
        module, x = lstmcore.LSTM(8, 32), torch.randn(5, 4, 8)
        stream = lstmcore.Stream(module, 4)
        assert stream.backend == "torch", stream.backend
        got = torch.stack([stream.step(each).clone() for each in x])
        torch.testing.assert_close(got, module(x)[0].detach())
        mask = torch.rand(5, 4) < 0.5
        stream.reset()
        torch.testing.assert_close(stream.chunk(x, reset=mask), module(x, reset=mask)[0].detach())
        """,
        NUMBA_DISABLE_JIT="1",
    )


@pytest.mark.slow
def test_in_a_forked_child():
    """Torch's threads are the parent's: the child goes on alone, from the parent's state."""
    in_process("""
        module, x = lstmcore.LSTM(256, 300, backend="numba"), torch.randn(5, 40, 256)
        torch.set_num_threads(2)
        with torch.no_grad():
            expected = module(x)[0].numpy()
        stream = lstmcore.Stream(module, 40)
        stream.step(x[0])

        def goes_on():
            fresh = lstmcore.Stream(module, 40)
            rows = fresh.chunk(x).numpy()
            same = [(stream.step(step).numpy() == right).all() for step, right in zip(x[1:], expected[1:])]
            fresh.reset()
            fresh.state = stream.state
            return all(same) and (rows == expected).all() and (fresh.state[0].numpy() == expected[-1]).all()

        child(goes_on)
        assert (stream.chunk(x[1:]).numpy() == expected[1:]).all()
    """)


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("threads_of", ["team", "pool", "caller"])
def test_interrupted_at_any_line(threads_of):
    """As by Ctrl-C: a step has happened or it has not, and the next one is right."""
    in_process(f"""
        launched = shared_out("{threads_of}") if "{threads_of}" != "caller" else torch.set_num_threads(1)
        module = lstmcore.LSTM(256, 600, proj_size=200)
        stream, x = lstmcore.Stream(module, 1), torch.randn(2, 1, 256)
        stream.step(x[0])
        before = stream.state
        right = stream.step(x[1]).clone()
        after = stream.state
        assert launched in (None, {{"{threads_of}"}}), launched

        class Struck(BaseException):
            pass

        def tracer(frame, event, argument):
            global left
            if "lstmcore" in frame.f_code.co_filename or "kernels" in frame.f_code.co_filename:
                left -= event == "line"
                if left == 0 and event == "line":
                    raise Struck
            return tracer

        at, struck = 0, True
        while struck:
            at, struck = at + 1, False
            stream.state, left = before, at
            sys.settrace(tracer)
            try:
                stream.step(x[1])
            except Struck:
                struck = True
            finally:
                sys.settrace(None)
            found = stream.state
            assert any(all(map(torch.equal, found, each)) for each in (before, after)), f"half a step, line {{at}}"
            stream.state = before
            assert torch.equal(stream.step(x[1]), right), at
        assert at > 10, at
    """)


@pytest.mark.parametrize("kind", [lstmcore.LSTM, nn.LSTM])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_fused_optimizers(kind, optimizer):
    """Torch does not count what they write."""
    module, other = kind(8, 17), kind(8, 17)
    stream, x = lstmcore.Stream(module, 1), torch.randn(1, 8)
    for each in (other, module):
        each(x[None])[0].sum().backward()
        optimizer(each.parameters(), 0.1, fused=True).step()
        if each is other:
            stream.step(x)
    with pytest.raises(RuntimeError, match="changed"):
        stream.step(x)
    stream.update()
    stream.reset()
    close(stream.step(x), long_run(module, x[None])[0][0])
    stream.step(x)


def test_weights_that_come_back_to_an_address():
    """As those of ``module.half().float()`` may."""
    for _ in range(10):
        module = lstmcore.LSTM(8, 8)
        stream = lstmcore.Stream(module, 1)
        for _ in range(2):
            module.bias_ih_l0.data = module.bias_ih_l0.detach() + 1
        with pytest.raises(RuntimeError, match="changed"):
            stream.step(torch.zeros(1, 8))


def weight_norm(module: nn.Module, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, name)


COMPUTED = {  # how a weight is computed before each call of the module, and changes of what it is computed from
    "pruned": (
        lambda m, name: prune.l1_unstructured(m, name, 0.3),
        {
            "original": lambda m: m.weight_ih_l0_orig.mul_(3),
            "again": lambda m: prune.l1_unstructured(m, "weight_ih_l0", 0.5),
            "mask": lambda m: m.weight_ih_l0_mask[4:].zero_(),
            "removed": lambda m: prune.remove(m, "weight_ih_l0"),
        },
    ),
    "weight norm": (
        weight_norm,
        {"g": lambda m: m.weight_ih_l0_g.mul_(3), "v": lambda m: m.weight_ih_l0_v[3:].mul_(3)},
    ),
    "spectral norm": (nn.utils.spectral_norm, {"weight": lambda m: m.weight_ih_l0_orig[3:].mul_(3)}),
    "parametrized": (
        lambda m, name: parametrize.register_parametrization(m, name, nn.Tanh()),
        {
            "again": lambda m: parametrize.register_parametrization(m, "weight_ih_l0", nn.Sigmoid()),
            "replaced": lambda m: setattr(
                m.parametrizations.weight_ih_l0, "original", nn.Parameter(torch.randn(68, 5).double())
            ),
        },
    ),
    "no parameter": (
        lambda m, name: (w := m.weight_ih_l0.detach(), delattr(m, name), setattr(m, name, w)),
        {
            "in place": lambda m: m.weight_ih_l0.mul_(3),
            "replaced": lambda m: setattr(m, "weight_ih_l0", torch.ones(68, 5).double()),
        },
    ),
}


@pytest.mark.parametrize("kind", [lstmcore.LSTM, nn.LSTM])
@pytest.mark.parametrize(("way", "change"), [(way, change) for way in COMPUTED for change in COMPUTED[way][1]])
def test_computed_weights(way, change, kind):
    module, x = kind(5, 17, dtype=torch.float64).eval(), torch.randn(1, 5, dtype=torch.float64)
    compute, changes = COMPUTED[way]
    compute(module, "weight_ih_l0")
    stream = lstmcore.Stream(module, 1)
    with torch.no_grad():
        close(stream.step(x), module(x[None])[0][0])
        stream.step(x)  # the call of the module has changed nothing
        changes[change](module)
    with pytest.raises(RuntimeError, match="changed"):
        stream.step(x)
    stream.update()
    stream.reset()
    close(stream.step(x), long_run(module, x[None])[0][0])


def test_other_parameters_of_a_module_may_change():
    class Model(lstmcore.LSTM):
        def __init__(self) -> None:
            super().__init__(5, 17)
            self.head = nn.Linear(17, 1)

    module = Model()
    stream = lstmcore.Stream(module, 1)
    nn.init.zeros_(module.head.weight)
    stream.step(torch.zeros(1, 5))


def test_an_output_outlives_its_stream():
    """Its memory is not lent to anyone as long as it lives."""
    module, x = lstmcore.LSTM(64, 512, backend="numba"), torch.randn(64, 64)
    outputs = [lstmcore.Stream(module, 64).step(x), lstmcore.Stream(module, 64).step(x.numpy())]
    stream = lstmcore.Stream(module, 64)
    outputs.append(stream.chunk(x[None])[0])
    stream.chunk(torch.zeros(2, 64, 64))
    others = [lstmcore.Stream(module, 64).step(torch.zeros(64, 64)) for _ in range(4)]
    assert all(other.any() for other in others)
    expected = long_run(module, x[None])[0][0]
    for output in outputs:
        same(torch.as_tensor(output), expected)


def test_chunks_of_many_lengths_need_no_more_memory():
    module = lstmcore.LSTM(3, 5, batch_first=True, backend="numba")
    stream, used = lstmcore.Stream(module, 300), []
    tables = tracemalloc.DomainFilter(
        True, np.lib.tracemalloc_domain
    )  # NumPy's memory, not what a compiler needs beside
    multiples.cache_clear()  # what is traced is allocated from here on, not lent from what other calls left
    buffers.clear()
    tracemalloc.start()
    try:
        for lengths in ([50], [*range(1, 51)]):
            for steps in lengths:
                stream.chunk(torch.zeros(300, steps, 3))
            multiples.cache_clear()
            buffers.clear()
            traces = tracemalloc.take_snapshot().filter_traces([tables]).traces
            used.append(sum(trace.size for trace in traces))
    finally:
        tracemalloc.stop()
    offsets = 49 * 3 * 300 * 8  # bytes: int64 offsets of the rows of x, y and reset, for each of the other lengths
    assert used[1] - used[0] < offsets / 3, used


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        "stream.step(x, reset=freed(torch.zeros(4096, dtype=torch.bool)))",
        "stream.reset(freed(torch.zeros(4096, dtype=torch.bool)))",
        "stream.state = freed(torch.zeros(1, 4096, 8)), torch.zeros(1, 4096, 8)",
    ],
)
def test_freed_masks_and_states(use):
    in_process(f"""
        def freed(tensor):
            tensor.untyped_storage().resize_(0)
            return tensor

        for backend in ("numba", "reference"):
            stream, x = lstmcore.Stream(lstmcore.LSTM(8, 8), 4096, backend=backend), torch.zeros(4096, 8)
            try:
                {use}
            except RuntimeError as error:
                assert "is gone" in str(error), error
            else:
                raise AssertionError("used")
    """)


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_are_unlike_states(backend):
    stream = lstmcore.Stream(lstmcore.LSTM(3, 5), 2, backend=backend)
    h, c = (each.numpy() for each in stream.state)
    for value, error, words in (
        (None, RuntimeError, r"expected \(h, c\), got NoneType"),
        ((h, c, c), RuntimeError, r"expected \(h, c\), got 3"),
        ((h.tolist(), c), TypeError, "Expected h to be a tensor or an array of NumPy, got list"),
        ((h, c.astype(">f4")), RuntimeError, "Expected c of shape .* got .* >f4"),
        ((h.astype(object), c), RuntimeError, "Expected h of shape .* got .* object"),
        ((torch.zeros(1, 2, 5).to_sparse(), c), TypeError, "plain dense tensors"),
    ):
        with pytest.raises(error, match=words):
            stream.state = value
    stream.state = np.ones_like(h)[..., ::-1], np.broadcast_to(np.float32(2), c.shape)  # of any strides, read-only
    assert (stream.state[0] == 1).all()
    assert (stream.state[1] == 2).all()
    stream.reset(np.array([0, 1])[::-1])
    assert not stream.state[0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_that_cannot_be_written(backend):
    module, x = problem("odd")
    stream, array = lstmcore.Stream(module, 9, backend=backend), x[0].numpy().copy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(torch.as_tensor(stream.step(array)), long_run(module, x[:1])[0][0])
    with pytest.raises(ValueError, match="does not match weight dtype"):
        stream.step(array.astype(np.longdouble))
    with pytest.raises(TypeError, match="plain dense tensors"):
        stream.step(x[0], reset=torch.ones(9, dtype=torch.bool).to_sparse())


def test_numbers_of_numpy():
    module = lstmcore.LSTM(3, 5, backend="numba")
    stream = lstmcore.Stream(module, np.int64(2))
    assert stream.batch == 2
    x = torch.randn(4, 2, 3)
    chunks = [chunk.run()[0] for chunk in lstmcore.truncated(module, x, steps=np.int32(3))]
    assert torch.equal(torch.cat(chunks), stream.chunk(x))
