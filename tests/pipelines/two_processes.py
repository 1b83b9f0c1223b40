"""What torchrun starts for ``test_distributed.py``: every process trains on its rows, the first writes what came out.

    torchrun --nproc-per-node 2 tests/pipelines/two_processes.py cpu FILE

T time, B batch (of all processes), I input, H hidden.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstmcore

T, B, I, H = 40, 8, 6, 17
STEPS = 16  # of a chunk
CALLS = ("dense", "lengths", "packed", "chunks")
WRAPPERS = ("ddp", "fsdp2")
CLIP = 0.005
WHOLE = StateDictOptions(full_state_dict=True)


class Model(nn.Module):
    """An LSTM and a linear layer; called with what an LSTM is called with."""

    def __init__(self, lstm: type[nn.Module], dtype: torch.dtype = torch.float64, **options) -> None:
        super().__init__()
        self.lstm = lstm(I, H, 2, dtype=dtype, **options)
        self.linear = nn.Linear(H, 1, dtype=dtype)

    def forward(self, input: Tensor | PackedSequence, hx=None, **control):
        output, state = self.lstm(input, hx, **control)
        return self.linear(output.data if isinstance(output, PackedSequence) else output), state


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Input (T, B, I), target (T, B, 1) and lengths (B,), all of which reach the last chunk; of all processes."""
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(T, B, size, generator=generator, dtype=torch.float64) for size in (I, 1))
    return x, y, torch.randint(T - T % STEPS + 1, T + 1, (B,), generator=generator)


def losses(model: nn.Module, call: str, rows: slice, device: str = "cpu"):
    """The parts of the loss that come from ``rows``, one for each backward pass: sums over what a mean is of."""
    x, y, lengths = data()
    dtype = next(model.parameters()).dtype
    x, y, lengths = x[:, rows].to(device, dtype), y[:, rows].to(device, dtype), lengths[rows]
    inside = torch.arange(T, device=device)[:, None] < lengths.to(device)
    if call == "dense":
        yield (model(x)[0] - y).square().sum() / (T * B)
    elif call == "lengths":
        output, _ = model(x, lengths=lengths.to(device))
        yield (output - y)[inside].square().sum() / (T * B)
    else:
        packed, target = (pack_padded_sequence(each, lengths, enforce_sorted=False) for each in (x, y))
        if call == "packed":
            yield (model(packed)[0] - target.data).square().sum() / (T * B)
            return
        for chunk in lstmcore.truncated(model, packed, steps=STEPS):
            yield (chunk.run()[0] - chunk.of(target).data).square().sum() / (T * B)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def wrapped(kind: str, model: nn.Module, device: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    fully_shard(model.lstm, mesh=mesh)  # a group of parameters of its own
    return fully_shard(model, mesh=mesh)


def share(call: str, kind: str, device: str) -> dict[str, Any]:
    """Gradients of one pass (over all chunks), then three steps with clipped gradients, and what is left of it."""
    torch.manual_seed(1)
    # Triton's kernels have no float64
    dtype, backend = (torch.float32, "triton") if device == "cuda" else (torch.float64, "numba")
    model = Model(lstmcore.LSTM, dtype, backend=backend)
    start = {name: each.detach().clone() for name, each in model.state_dict().items()}
    runs = wrapped(kind, model.to(device), device)
    size, rank = dist.get_world_size(), dist.get_rank()
    rows = slice(rank * B // size, (rank + 1) * B // size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    found: dict[str, Any] = {"start": start, "losses": [], "norms": []}
    for step in range(4):
        total = torch.zeros((), dtype=torch.float64)
        with lstmcore.record_gradient_flow(model) as flow:
            for loss in losses(runs, call, rows, device):
                (loss * size).backward()  # gradients are means over the processes
                total += loss.detach().cpu()
        dist.all_reduce(total)
        found["losses"].append(total)
        if step == 0:
            found["gradients"] = {name: whole(p.grad) for name, p in model.named_parameters()}
            found["recorded"] = [record.c.mean / size for record in flow.records]  # of the first process's rows
        else:
            found["norms"].append(whole(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
            optimizer.step()
        optimizer.zero_grad()
    state = get_model_state_dict(model, options=WHOLE)
    found["state"] = {name: each.cpu().clone() for name, each in state.items()}  # of DDP they are the parameters
    set_model_state_dict(model, dict(start), options=WHOLE)  # which it changes
    found["restored"] = {name: whole(p) for name, p in model.named_parameters()}
    return found


def main(device: str, path: Path) -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    found = {(kind, call): share(call, kind, device) for kind in WRAPPERS for call in CALLS}
    if dist.get_rank() == 0:
        torch.save(found, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
