"""The smoke test of an installed package: ``python -I smoke.py``, where no source of it is importable.

It uses nothing but the package and what that depends on; the first thing that is wrong ends it.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import pathlib
import sys

import torch

import lstmcore


def installed() -> None:
    """The package is the installed one, complete, and has its marker of types and its kernels."""
    place = pathlib.Path(lstmcore.__file__).parent
    assert place.parent.name == "site-packages", f"{place} is not an installed package"
    assert place.is_relative_to(sys.prefix), f"{place} is not of this environment"
    assert not any(pathlib.Path(entry or ".", "pyproject.toml").exists() for entry in sys.path), sys.path
    files = importlib.metadata.files("lstmcore") or []
    assert all(file.locate().exists() for file in files)
    names = {file.as_posix() for file in files}
    for name in ("lstmcore/py.typed", "lstmcore/kernels/cpu/jit.py", "lstmcore/kernels/gpu/persistent.py"):
        assert name in names, f"{name} is not installed"
    assert importlib.metadata.version("lstmcore") == lstmcore.__version__


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth).abs().max() / truth.abs().max())


def computes(backend: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of two layers in both directions are torch's, in the precision of ``dtype``."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(7, 24, 2, bidirectional=True, dtype=torch.float64)
    ours = lstmcore.LSTM(7, 24, 2, bidirectional=True, dtype=dtype, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(40, 3, 7, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        given = x.to(module.weight_ih_l0.dtype).requires_grad_()
        output, (h_n, c_n) = module(given)
        (output.square().sum() + h_n.sum() + c_n.sum()).backward()
        found.append([output, h_n, c_n, given.grad, *(parameter.grad for parameter in module.parameters())])
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) <= 200 * torch.finfo(dtype).eps, (backend, dtype)


def kept() -> None:
    """A state_dict and a whole module come back from a file."""
    module = lstmcore.LSTM(3, 5)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(6, 2, 3)
    assert torch.equal(again(x)[0], module(x)[0])
    torch.nn.LSTM(3, 5).load_state_dict(module.state_dict())


def refusal() -> str:
    """What ``backend="triton"`` says where it cannot run; nothing where it can."""
    try:
        lstmcore.LSTM(3, 5, backend="triton")(torch.randn(6, 2, 3))
    except RuntimeError as error:
        return str(error)
    return ""


def gpu_kernels() -> str:
    """Whether the GPU's kernels import, where there is Triton: they run on GPUs only."""
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        message = refusal()
        assert "triton" in message.lower(), message
        return "no Triton, and the error says so"
    from lstmcore.kernels.gpu import backend

    assert backend.forward
    return "GPU kernels import"


def main() -> None:
    installed()
    for dtype in (torch.float32, torch.float64):
        computes("numba", dtype)
        computes("auto", dtype)
    cache = pathlib.Path(os.environ["NUMBA_CACHE_DIR"], "lstmcore-kernels")
    assert any(cache.glob("*.bin")), f"no kernel was compiled into {cache}"
    kept()
    print(f"lstmcore {lstmcore.__version__} with torch {torch.__version__}: ok, {gpu_kernels()}")


if __name__ == "__main__":
    main()
