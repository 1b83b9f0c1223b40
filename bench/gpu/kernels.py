"""Compiles the GPU kernels without a GPU, and says what came out.

Every configuration that the tiling chooses for a grid of sizes, for each target: registers, spills, shared memory and
tensor-core instructions, read from the machine code with the ``cuobjdump`` that Triton carries.  It fails on spills
(save for those that ``known`` names), on shared memory over the target's limit, on weights that are read from shared
memory in every step, where tensor-core instructions are missing, and on products whose operands are laid out for more
terms than they have, which Triton computes wrongly.  ``make kernels`` runs it with the Triton that torch 2.11 ships and
with the newest.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from json import dumps
from multiprocessing import get_context
from pathlib import Path

from lstmcore.kernels.gpu import tiling
from lstmcore.kernels.gpu.tiling import Design
from rich.console import Console
from rich.progress import track

from bench import rows
from bench.gpu import launches
from bench.tables import grid

# Compute capability: shared memory that a program may use, in bytes; and the SMs of a device of the kind.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SMS = {80: 108, 89: 128, 90: 132, 100: 148}
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")
DTYPES = ("float16", "bfloat16", "tf32", "float32")


@dataclass(frozen=True)
class Configuration:
    """One kernel to compile."""

    target: int
    dtype: str  # of DTYPES: tf32 and float32 are float32 with and without TF32
    hidden: int
    batch: int
    backward: bool
    directions: int = 1
    ragged: bool = False
    reset: bool = False
    save: bool = True  # forward: keeps what backward needs; backward: everything that can be given is, norms too


@dataclass(frozen=True, kw_only=True)
class Compiled(Configuration):
    """What the compiler made of it."""

    triton: str
    design: str
    registers: int
    stack: int  # bytes; anything above 0 is a spill
    spills: int  # instructions that read or write local memory
    shared: int  # bytes
    products: int  # tensor-core instructions
    overrun: int  # products of tiles whose operands are laid out for more terms than they have
    fma: int  # scalar multiply-adds: many, where a product missed the tensor cores
    step: int  # instructions of a step
    step_products: int
    step_fragments: int  # loads of operands from shared memory (LDSM) in each step
    step_barriers: int
    problem: str  # empty where all is well


GRID = (
    *((h, b) for h in (64, 128, 256, 512, 768, 1024, 2048) for b in (1, 16, 64, 256)),
    (1, 1), (20, 3), (129, 5), (513, 17), (1100, 16),
)  # fmt: skip
FEWEST = ((128, 16), (1024, 16))
FEW = ((128, 16), (129, 5), (768, 16), (1024, 16), (1024, 256), (2048, 16))


def design_of(case: Configuration) -> Design:
    """What the tiling chooses."""
    precision = case.dtype if case.dtype in ("tf32", "float32") else "16"
    sizes = (case.hidden, case.batch, case.directions)
    limits = {"shared": SHARED[case.target], "wgmma": case.target == 90}
    return tiling.choose_design(*sizes, precision, SMS[case.target], case.backward, **limits)


def configurations(targets: Sequence[int], quick: bool) -> Iterator[Configuration]:
    """What is compiled: the grid in each dtype; on some of it what a call may add (ragged, reset, inference).

    Batches that get the same tiles get the same kernel, which is compiled once.
    """
    for target in targets:
        seen = set()
        for hidden, batch in GRID if not quick else FEW if target == 90 else FEWEST:
            for dtype in ("bfloat16",) if quick else DTYPES:
                for backward in (False, True):
                    case = Configuration(target, dtype, hidden, batch, backward)
                    d = design_of(case)
                    kernel = (hidden, dtype, backward, d.kind, d.units, d.tile, d.chunk, d.chunks, d.stream, d.warps)
                    if kernel not in seen:
                        seen.add(kernel)
                        yield case
        for dtype in ("tf32", "float32") if quick and target == 90 else ():
            for backward in (False, True):
                yield Configuration(target, dtype, 64, 16, backward)
                yield Configuration(target, dtype, 512, 16, backward)
        for hidden, batch in ((128, 16),) if quick else ((128, 16), (768, 16), (1024, 256)):
            for backward in (False, True):
                case = Configuration(target, "bfloat16", hidden, batch, backward, directions=2)
                yield replace(case, ragged=True, reset=True)
                yield replace(case, save=False)
                yield Configuration(target, "float32", 20, 3, backward, reset=True)
                if not quick:
                    yield replace(case, ragged=True, save=False)
                    yield replace(case, reset=True)


def machine_code(binary: bytes) -> tuple[str, str]:
    """The use of resources and the instructions, as ``cuobjdump`` tells them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()

        def dump(option: str) -> str:
            command = [knobs.nvidia.cuobjdump.path, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return dump("-res-usage"), dump("-sass")


def compile_one(case: Configuration) -> Compiled:
    """Compiles one kernel and reads the machine code."""
    warnings.filterwarnings("ignore", category=UserWarning, module="triton")
    import triton
    from triton.backends.compiler import GPUTarget

    design = design_of(case)
    calls = {name: getattr(case, name) for name in ("dtype", "hidden", "directions", "ragged", "reset", "save")}
    source, options = launches.source(design, case.backward, **calls)
    binary = triton.compile(source, target=GPUTarget("cuda", case.target, 32), options=options)
    usage, code = machine_code(binary.asm["cubin"])

    def count(*names: str) -> int:
        return len(re.findall(rf"\b(?:{'|'.join(names)})\b", code))

    step = longest_loop(code)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    result = Compiled(
        **asdict(case),
        triton=triton.__version__,
        design=str(design),
        registers=int(found[1]),
        stack=int(found[2]),
        spills=count("LDL", "STL"),
        shared=binary.metadata.shared,
        products=count(*PRODUCTS),
        overrun=overrun(binary.asm["ttgir"]),
        fma=count("FFMA"),
        step=len(step),
        step_products=sum(name in PRODUCTS for name in step),
        step_fragments=step.count("LDSM"),
        step_barriers=step.count("BAR"),
        problem="",
    )
    return replace(result, problem=", ".join(problems(result)))


def overrun(layouts: str) -> int:
    """How many products of tiles in Triton's intermediate code have fewer terms than a row of four threads holds.

    Each of the four holds kWidth terms in a row.  Triton takes that number from the narrowest load that an operand
    depends on, and with masks made of bytes it came to 32 terms where there were 16.
    """
    dots = re.findall(r"tt\.dot .*: tensor<([\dx]+)x\w+, #ttg\.dot_op<\{opIdx = 0.*?kWidth = (\d+)", layouts)
    return sum(int(shape.split("x")[-1]) < 4 * int(width) for shape, width in dots)


def longest_loop(code: str) -> list[str]:
    """The names of the instructions between a branch back and its target, of the longest such loop: that over time."""
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", code)
    loops = [
        (int(at, 16) - int(back[1], 16), int(back[1], 16), int(at, 16))
        for at, name, rest in lines
        if name == "BRA" and (back := re.search(r"(0x[0-9a-f]+)", rest)) and int(back[1], 16) < int(at, 16)
    ]
    _, begin, end = max(loops)
    return [name for at, name, _ in lines if begin <= int(at, 16) <= end]


def known(result: Compiled) -> bool:
    """Whether all that is wrong is spills where so few SMs leave room for streamed slices of 32 units only."""
    spilled = result.problem == f"{result.stack} bytes of stack, {result.spills} spills"
    return spilled and result.target == 80 and result.hidden == 2048


def problems(result: Compiled) -> Iterator[str]:
    """What is wrong with a kernel."""
    if result.stack or result.spills:
        yield f"{result.stack} bytes of stack, {result.spills} spills"
    if result.shared > SHARED[result.target]:
        yield f"{result.shared} bytes of shared memory, the target has {SHARED[result.target]}"
    if not result.products:
        yield "no tensor-core instructions"
    if result.overrun:
        yield f"{result.overrun} products of fewer terms than their operands are laid out for"
    # One load serves h or dz for all the tile's rows of weights; weights in shared memory take one more a product.
    design = design_of(result)
    blocks = design.units * (1 if result.backward else 4) // 16
    if not design.stream and result.step_fragments > result.step_products * (1 / blocks + 0.5):
        yield "weights are read from shared memory in every step"


def compile_all(cases: Sequence[Configuration], workers: int | None) -> Iterator[Compiled]:
    """All of them, in their order, in other processes: one that was started to interpret kernels cannot compile any."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from pool.map(compile_one, cases)
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def show(console: Console, results: Sequence[Compiled]) -> None:
    """A table of all kernels."""
    wrong = sum(bool(r.problem) for r in results)
    expected = sum(bool(r.problem) and known(r) for r in results)
    table = grid(
        f"{len(results)} kernels, Triton {results[0].triton}, {wrong} with problems ({expected} of them known)",
        ("sm", "dtype", "H", "B", "kernel"),
        ("regs", "spills", "shared KiB", "mma", "insts a step", "barriers"),
    )
    for name in ("design", "problem"):
        table.add_column(name)
    for r in results:
        flags = (("ragged", r.ragged), ("reset", r.reset), ("D2", r.directions == 2), ("plain", not r.save))
        name = " ".join(["backward" if r.backward else "forward", *(name for name, on in flags if on)])
        figures = (r.registers, r.spills, f"{r.shared / 1024:.0f}", r.products, r.step, r.step_barriers)
        cells = (r.target, r.dtype, r.hidden, r.batch, name, *figures, r.design)
        table.add_row(*map(str, cells), f"[red]{r.problem}[/]")
    console.print(table)


def run(target: Sequence[int] | None, quick: bool, workers: int | None, csv: Path | None, json: bool) -> int:
    """``python -m bench kernels``."""
    cases = list(configurations(target or sorted(SHARED), quick))
    compiled = compile_all(cases, workers)
    results = list(
        track(compiled, "compiling", len(cases), console=Console(stderr=True), disable=not sys.stderr.isatty())
    )
    if json:
        print(dumps([asdict(result) for result in results]))
    else:
        show(Console(width=None if sys.stdout.isatty() else 180), results)
    if csv:
        rows.write(csv, results, Compiled)
    return int(any(result.problem and not known(result) for result in results))
