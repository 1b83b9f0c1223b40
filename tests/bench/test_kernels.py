"""``python -m bench kernels``: what it compiles, how it reads machine code, and that it finds what it looks for."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="the GPU kernels need Triton, which is not installed")

from bench import cli
from bench.gpu import kernels as kernel_report
from bench.gpu.kernels import SHARED, Configuration, compile_all, configurations, longest_loop, problems

pytestmark = pytest.mark.xdist_group("kernels")  # compiled once, for all

CASES = [
    Configuration(90, "bfloat16", 128, 16, backward=False),
    Configuration(90, "float16", 1024, 16, backward=True),
    Configuration(80, "tf32", 256, 16, backward=False),
    Configuration(100, "float32", 64, 5, backward=True, directions=2, ragged=True, reset=True),
    Configuration(90, "float32", 17, 7, backward=True, reset=True),
]


@pytest.fixture(scope="module")
def compiled():
    return list(compile_all(CASES, workers=2))


@pytest.mark.slow
def test_kernels_compile_without_a_problem(compiled):
    """One of each design, direction and precision; ``make kernels`` compiles them all."""
    assert [(r.target, r.dtype, r.hidden, r.backward) for r in compiled] == [
        (c.target, c.dtype, c.hidden, c.backward) for c in CASES
    ]
    for result in compiled:
        assert result.problem == "", result
        assert 32 < result.registers <= 255
        assert result.step_products > 0
        assert result.step > result.step_products + result.step_barriers


@pytest.mark.slow
def test_it_finds_what_it_looks_for(compiled):
    fine = compiled[0]
    for wrong, word in (
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 3}, "3 spills"),
        ({"shared": SHARED[90] + 1}, "shared memory"),
        ({"products": 0}, "no tensor-core"),
        ({"overrun": 2}, "2 products of fewer terms"),
        ({"step_fragments": fine.step_products}, "weights are read"),
    ):
        found = ", ".join(problems(replace(fine, **wrong)))
        assert word in found, wrong


def test_operands_laid_out_for_more_terms_than_they_have():
    line = (
        "%12 = tt.dot %1, %2, %3, inputPrecision = tf32 : tensor<8x32x16xf32, #ttg.dot_op<{opIdx = 0, parent = #mma, "
        "kWidth = WIDTH}>> * tensor<8x16x8xf32, #ttg.dot_op<{opIdx = 1, parent = #mma, kWidth = WIDTH}>> -> tensor<...>"
    )
    assert kernel_report.overrun(line.replace("WIDTH", "4")) == 0
    assert kernel_report.overrun("\n".join([line.replace("WIDTH", "8")] * 3)) == 3


@pytest.mark.slow
def test_only_spills_are_known_and_only_where_they_are(compiled):
    spilled = replace(compiled[0], target=80, hidden=2048, stack=8, spills=3)
    spilled = replace(spilled, problem="8 bytes of stack, 3 spills")
    assert kernel_report.known(spilled)
    for other in ({"target": 90}, {"hidden": 1024}, {"problem": spilled.problem + ", no tensor"}):
        assert not kernel_report.known(replace(spilled, **other)), other


def test_the_loop_over_time_is_the_longest():
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   LDG.E R3, [R2.64] ;
        /*0040*/              @P1  BRA 0x30 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/             @!UP2 BRA 0x20 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80 ;
    """
    assert longest_loop(code) == ["HMMA", "LDG", "BRA", "BAR", "BRA"]


def test_configurations_cover_every_target_dtype_and_design():
    everything = list(configurations(sorted(SHARED), quick=False))
    assert {c.target for c in everything} == set(SHARED)
    for target in SHARED:
        cases = [c for c in everything if c.target == target]
        assert {c.dtype for c in cases} == set(kernel_report.DTYPES)
        for backward in (False, True):
            designs = [kernel_report.design_of(c) for c in cases if c.backward == backward]
            assert {d.kind for d in designs} == {"resident", "split"} | ({"wide"} if target == 90 else set())
            assert any(d.stream for d in designs)
            assert any(d.chunks > 1 and not d.stream for d in designs)
            assert any(d.tiles > 1 for d in designs)
            assert any(c.ragged and c.reset and c.directions == 2 for c in cases)
    assert len(list(configurations([90], quick=True))) < len(everything) / 5


def test_only_chosen_targets(capsys):
    with pytest.raises(SystemExit):
        cli.main(["kernels", "--target", "70"])
    assert "invalid choice" in capsys.readouterr().err
