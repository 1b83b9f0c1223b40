"""Which of cuDNN's recurrent algorithms PyTorch asks for: torch does not say, so its rule is written down here.

Read in ``aten/src/ATen/native/cudnn/RNN.cpp`` (``get_algo``, ``use_rnn_persist_small_h``,
``use_persist_common_heuristics``, ``use_persist_device_heuristics``) of PyTorch's main branch as it is since bfloat16
goes through cuDNN (October 2025, releases 2.10 and 2.11; that takes cuDNN 9.13 and compute capability 8.0); the rule
itself stood the same before.  Forward and backward are decided apart.  What ran on an H200 (torch 2.11, cuDNN 9.19; by
the names of its kernels) agrees, but for bfloat16 at small H, where torch asks for SMALL_H as for the others and cuDNN
runs STANDARD: 536 kernels for 256 steps.  That cuDNN runs at all is seen and not derived:
``bench.providers.algorithm``.
"""

from __future__ import annotations

from bench.cases import Case

STANDARD, PERSIST_STATIC, SMALL_H = "STANDARD", "PERSIST_STATIC", "SMALL_H"
ALGORITHMS = (STANDARD, PERSIST_STATIC, SMALL_H)

# The largest H of CUDNN_RNN_ALGO_PERSIST_STATIC_SMALL_H for an LSTM.
SMALL_H_FORWARD, SMALL_H_BACKWARD = 192, 128


def _device_persists(capability: tuple[int, int], multiprocessors: int) -> bool:
    """Whether torch trusts PERSIST_STATIC on such a device: 8.0 and newer, large, and not of the 8.6 kind.

    For compute capability 7.0 torch has a table by steps and batch; lstmcore's kernels start at 8.0, so it is left out.
    """
    major, minor = capability
    return major >= 8 and minor != 6 and multiprocessors >= 98


def algorithm(case: Case, *, backward: bool, capability: tuple[int, int] = (9, 0), multiprocessors: int = 132) -> str:
    """The algorithm of one pass over ``case``; the defaults are an H100 or H200."""
    if case.proj_size or case.ragged:
        return STANDARD
    small = SMALL_H_BACKWARD if backward else SMALL_H_FORWARD
    if case.dtype in ("float16", "float32") and case.hidden_size <= small:
        return SMALL_H
    if (
        case.dtype == "float16"
        and case.num_layers == 1
        and case.directions == 1
        and case.hidden_size <= 1024
        and case.hidden_size % 128 == 0
        and case.input_size % 128 == 0
        and case.batch % 8 == 0
        and case.batch <= 128
        and _device_persists(capability, multiprocessors)
    ):
        return PERSIST_STATIC
    return STANDARD


def label(case: Case, mode: str, capability: tuple[int, int] = (9, 0), multiprocessors: int = 132) -> str:
    """What a row says: one algorithm, or forward's and backward's where they differ ("SMALL_H, then STANDARD")."""
    forward, backward = (
        algorithm(case, backward=backward, capability=capability, multiprocessors=multiprocessors)
        for backward in (False, True)
    )
    return forward if mode == "inference" or forward == backward else f"{forward}, then {backward}"
