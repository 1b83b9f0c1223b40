"""Types of the commands' arguments."""

from __future__ import annotations

import argparse

import torch

from lstmcore.backends.registry import FLOATS

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def size(text: str) -> int:
    """A positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {value}")
    return value


def seconds(text: str) -> float:
    """A positive number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return value


def device(text: str) -> str:
    """A device that is there."""
    try:
        kind = torch.device(text).type
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if kind == "cuda" and not torch.cuda.is_available():
        message = f"torch {torch.__version__} finds no CUDA device here; use --device cpu"
        raise argparse.ArgumentTypeError(message)
    return text
