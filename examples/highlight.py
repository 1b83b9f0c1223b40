"""Syntax highlighting, learned: which characters of a Python function are code, which a comment, which in a string.

The data of ``train.py``, and what its result is compared with.  The functions are those of Python's standard library,
which every machine that runs this has; their labels come from its tokenizer.  What a character is depends on a quote
that may be hundreds of characters back, so a model has to remember; a table of the last few characters cannot.

Legend: B functions of a batch, n characters of a context, S characters of several functions, K kinds.
"""

from __future__ import annotations

import ast
import io
import sysconfig
import token
import tokenize
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import Dataset, Sampler

from common import CannotRun

KINDS = ("code", "comment", "string")
CHARACTERS = 128  # ASCII; others are read as "?"
HELD_OUT = 10  # every tenth file is not trained on
SHORTEST = 32  # characters; shorter functions are left out
CONTEXTS = (3, 4, 5, 6)  # n of the tables that are tried

# From where one opens to where it closes all is string, as before Python 3.12; templates came with 3.14.
OPENS = {getattr(token, name) for name in ("FSTRING_START", "TSTRING_START") if hasattr(token, name)}
CLOSES = {getattr(token, name) for name in ("FSTRING_END", "TSTRING_END") if hasattr(token, name)}

# ----------------------------------------------------------------------------------------------------------- functions


def functions(file: Path) -> Iterator[str]:
    """The source of every function of a module and of its classes, as it stands there."""
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = io.StringIO(text).readlines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # about code that is not ours
        body = ast.parse(text).body
    for node in body:
        for each in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield "".join(lines[each.lineno - 1 : each.end_lineno])


def labelled(source: str) -> tuple[Tensor, Tensor]:
    """Characters and kinds of a function, both (S,) of uint8."""
    lines = io.StringIO(source).readlines()
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    kinds = torch.zeros(len(source), dtype=torch.uint8)
    depth, opened = 0, 0
    for kind, _, (row, column), (end_row, end_column), _ in tokenize.generate_tokens(iter([*lines, ""]).__next__):
        begin, end = starts[row - 1] + column, starts[min(end_row, len(starts)) - 1] + end_column
        if kind == token.COMMENT:
            kinds[begin:end] = KINDS.index("comment")
        elif kind == token.STRING and not depth:
            kinds[begin:end] = KINDS.index("string")
        elif kind in OPENS:
            opened = opened if depth else begin
            depth += 1
        elif kind in CLOSES:
            depth -= 1
            if not depth:
                kinds[opened:end] = KINDS.index("string")
    return torch.frombuffer(bytearray(source.encode("ascii", "replace")), dtype=torch.uint8), kinds


class Functions(Dataset[tuple[Tensor, Tensor]]):
    """Functions of the standard library, labelled when they are asked for: in the worker that loads them.

    Attributes:
        lengths: (functions,), of each in characters; what is beyond ``longest`` is cut off.
    """

    def __init__(self, sources: Sequence[str], longest: int) -> None:
        self.sources, self.longest = [source for source in sources if len(source) >= SHORTEST], longest
        self.lengths = torch.tensor([min(len(source), longest) for source in self.sources])

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        characters, kinds = labelled(self.sources[index])
        return characters[: self.longest], kinds[: self.longest]

    @property
    def checksum(self) -> int:
        return zlib.crc32("\0".join(self.sources).encode())


def standard_library(longest: int, most: int | None = None) -> tuple[Functions, Functions]:
    """The functions to train on and those held out, of other files; ``most``: of so many files only."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))[:most]
    if len(files) < 2:
        raise CannotRun(f"{len(files)} files *.py in {folder}, where Python's standard library should be")
    parts: tuple[list[str], list[str]] = [], []
    for index, file in enumerate(files):
        parts[index % HELD_OUT == 0].extend(functions(file))
    return Functions(parts[0], longest), Functions(parts[1], longest)


# ------------------------------------------------------------------------------------------------------------- batches


class Batches(Sampler[list[int]]):
    """Batches of functions that take the same number of chunks, those of one process: each trains as often.

    The order follows from ``seed`` and the epoch alone, not from the number of processes, and any batch of any epoch
    can be the first: a training that goes on needs nothing else.  Functions that fill no batch wait for another epoch.

    Args:
        lengths: (functions,) in characters.
        batch: B, over all processes.
        steps: of a chunk.
    """

    def __init__(self, lengths: Tensor, batch: int, steps: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._chunks = (lengths + steps - 1) // steps
        self._batch, self._seed, self._rank, self._world_size = batch, seed, rank, world_size
        if not len(self.of_epoch(0)):
            raise CannotRun(f"no {batch} functions take the same number of chunks: lower --batch")
        self.start(0, 0)

    def of_epoch(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, over all processes."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        batches = []
        for chunks in self._chunks.unique():
            (group,) = (self._chunks == chunks).nonzero(as_tuple=True)
            group = group[torch.randperm(len(group), generator=generator)]
            batches += [each.tolist() for each in group.split(self._batch) if len(each) == self._batch]
        return [batches[index] for index in torch.randperm(len(batches), generator=generator)]

    def start(self, epoch: int, first: int) -> list[list[int]]:
        """What is iterated over next is this epoch's batches from ``first`` on: they are returned, whole."""
        self._batches = self.of_epoch(epoch)[first:]
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield batch[self._rank :: self._world_size]

    def __len__(self) -> int:
        return len(self._batches)


@dataclass(frozen=True)
class Pack:
    """Packs the functions of a batch, in ``parts`` that run one after the other; a worker process can be sent it."""

    parts: int = 1

    def __call__(self, functions: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[PackedSequence, PackedSequence]]:
        packed = []
        for part in range(self.parts):
            characters, kinds = zip(*functions[part :: self.parts], strict=True)
            packed.append((pack_sequence(characters, enforce_sorted=False), pack_sequence(kinds, enforce_sorted=False)))
        return packed


# ------------------------------------------------------------------------------------------------------------ baseline


class Table:
    """The kind that was the most frequent after the same n characters, the last of which is the one in question."""

    def __init__(self, n: int, characters: Sequence[Tensor], kinds: Sequence[Tensor]) -> None:
        self._n = n
        of_all = torch.cat(list(kinds)).long()
        self._contexts, inverse = torch.unique(self._keys(characters), return_inverse=True)
        counts = torch.bincount(inverse * len(KINDS) + of_all, minlength=len(self._contexts) * len(KINDS))
        self._kinds = counts.view(-1, len(KINDS)).argmax(1)
        self._usual = of_all.bincount().argmax()

    def _keys(self, characters: Sequence[Tensor]) -> Tensor:
        """A number for every context (S,); before the first character of a function there are zeros."""
        keys = []
        for each in characters:
            padded = torch.cat([each.new_zeros(self._n - 1), each]).long()
            keys.append(
                sum(padded[self._n - 1 - back : len(padded) - back] * CHARACTERS**back for back in range(self._n))
            )
        return torch.cat(keys)

    def __call__(self, characters: Sequence[Tensor]) -> Tensor:
        """The kinds (S,); that of a context never seen is the most frequent one."""
        keys = self._keys(characters)
        index = torch.searchsorted(self._contexts, keys).clamp(max=len(self._contexts) - 1)
        return torch.where(self._contexts[index] == keys, self._kinds[index], self._usual)


def baselines(trained_on: Functions, held_out: Functions) -> dict[str, float]:
    """The share of the held-out characters that is right without remembering: the usual kind, and the best table.

    Which n is the best is seen on the held-out functions themselves, in the table's favour.
    """
    characters, kinds = zip(*trained_on, strict=True)
    tested, expected = zip(*held_out, strict=True)
    truth = torch.cat(list(expected))

    def right(kinds: Tensor) -> float:
        return (kinds == truth).double().mean().item()

    usual = torch.cat(list(kinds)).bincount().argmax()
    tables = {n: right(Table(n, characters, kinds)(tested)) for n in CONTEXTS}
    best = max(tables, key=tables.__getitem__)
    return {f"always {KINDS[usual]}": right(usual), f"a table of the last {best} characters": tables[best]}
