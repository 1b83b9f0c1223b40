"""Packed batches from worker processes, forked and spawned: ``examples/highlight.py``, whose labels are made there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lstmcore

from ..support.modules import close

highlight = pytest.importorskip("highlight", reason="examples/highlight.py: examples/ is not on the path")
SOURCES = [f"def f{n}(x):\n    '''{'doc ' * n}'''\n    return x + {n}  # {'why ' * (n % 5)}\n" for n in range(40)]


def loader(functions, batches, **options) -> DataLoader:
    return DataLoader(
        functions, batch_sampler=batches, collate_fn=highlight.Pack(2), generator=torch.Generator(), **options
    )


@pytest.mark.serial
@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_make_the_batches_of_the_process_itself(method):
    """Also where the process has trained before it forks; and of each, an LSTM makes what torch.nn.LSTM makes."""
    functions = highlight.Functions(SOURCES, 128)
    batches = highlight.Batches(functions.lengths, 4, 32, seed=3)
    ours, theirs = lstmcore.LSTM(1, 33, backend="numba", dtype=torch.float64), nn.LSTM(1, 33, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())

    def run(module: nn.Module, packed) -> list[torch.Tensor]:
        output, states = module(packed._replace(data=packed.data[:, None].double() / 128))
        loss = output.data.square().mean()
        return [output.data, *states, *torch.autograd.grad(loss, list(module.parameters()))]

    expected = list(loader(functions, batches))
    run(ours, expected[0][0][0])
    got = list(loader(functions, batches, num_workers=2, multiprocessing_context=method, timeout=150))
    assert len(got) == len(expected) == len(batches) > 3
    for parts, wanted in zip(got, expected, strict=True):
        for (characters, kinds), (others, other_kinds) in zip(parts, wanted, strict=True):
            for one, other in ((characters, others), (kinds, other_kinds)):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for one, other in zip(run(ours, parts[0][0]), run(theirs, parts[0][0]), strict=True):
            close(one, other)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_divide_each_batch(world_size):
    """The batches are the same however many there are, every process has a share, from any place on."""
    lengths = torch.randint(1, 200, (100,))
    alone = highlight.Batches(lengths, 8, 50, seed=1)
    shares = [highlight.Batches(lengths, 8, 50, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch, first in ((0, 0), (2, 3)):
        whole = alone.start(epoch, first)
        assert whole == alone.of_epoch(epoch)[first:]
        for share in shares:
            share.start(epoch, first)
        for batch, *parts in zip(whole, *shares, strict=True):
            assert {len(part) for part in parts} == {8 // world_size}
            assert sorted(index for part in parts for index in part) == sorted(batch)
            assert len({(int(lengths[index]) + 49) // 50 for index in batch}) == 1, "they take other numbers of chunks"
    assert alone.of_epoch(0) != alone.of_epoch(1)


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ("x = 1  # 'no'\n", "ccccccc######c"),
        ('x = \'#\' + """a\n# b"""\n', "ccccsssccc" + "s" * 11 + "c"),
        ("x = f'{y!r}' 'z'\n", "ccccsssssssscsssc"),
        ("  x = f'''{f\"a\"}\n'''\n", "cccccc" + "s" * 14 + "c"),
        ("x = 'é' # ü\n", "ccccsssc###c"),
    ],
)
def test_labels(source, kinds):
    characters, found = highlight.labelled(source)
    assert "".join({0: "c", 1: "#", 2: "s"}[kind] for kind in found.tolist()) == kinds
    assert len(characters) == len(source)
    assert int(characters.max()) < highlight.CHARACTERS


def test_a_table_of_contexts():
    """Learns what its context decides, and answers the usual kind where it has not seen it."""
    texts = [torch.tensor(list(text.encode()), dtype=torch.uint8) for text in ("ababab", "bb")]
    kinds = [torch.tensor([0, 1, 2, 1, 2, 1]), torch.tensor([0, 1])]  # a: 2, but the first; b after a: 1
    table = highlight.Table(2, texts, kinds)
    assert table([torch.tensor(list(b"aba"), dtype=torch.uint8)]).tolist() == [0, 1, 2]
    assert table([torch.tensor(list(b"zz"), dtype=torch.uint8)]).tolist() == [1, 1]
