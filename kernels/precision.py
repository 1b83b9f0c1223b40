"""How torch wants float32 to be multiplied on a GPU, which cuDNN and the kernels both follow."""

from __future__ import annotations

import torch


def tf32() -> bool:
    """Whether torch's setting for RNNs allows TF32."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
