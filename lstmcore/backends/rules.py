"""When ``"auto"`` leaves a layer to torch: what was tuned for the device, else measurements as rules by class of shape.

T steps, B rows, H hidden units.
"""

from __future__ import annotations

import functools

import torch

from lstmcore.backends import machine, tuning
from lstmcore.backends.situation import Situation
from lstmcore.backends.timings import Verdict
from lstmcore.kernels.contract import Layer
from lstmcore.kernels.cpu import products, tiling

CUDNN_MEASURED_ON = ("NVIDIA H200", 132)  # the device whose rule ``faster_than_cudnn`` is: its name, and its SMs


@functools.cache
def _bfloat16_hardware() -> bool:
    """Whether this CPU multiplies bfloat16 (AVX512-BF16 or AMX), which ATen's LSTM then does."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _left_in_bfloat16(layer: Layer) -> bool:
    """Whether a dense bfloat16 layer that float32's rule would take is left to ATen."""
    if not _bfloat16_hardware():
        return False
    steps, hidden, batch = layer.steps, layer.hidden_size, layer.batch
    multiplied = products.this_machines(torch.bfloat16, tiling.cpu_isa())
    if multiplied.tiled:
        return not layer.training and hidden >= 128 and steps < 30
    if multiplied.paired and layer.training:
        return hidden < 128 and steps < 25
    if multiplied.paired:
        return steps < (30 if hidden >= 128 else 100) or (hidden >= 1024 and batch == 1)
    return batch * hidden > 128


def faster_than_aten(layer: Layer, several: bool = True) -> bool:
    """Whether the Numba kernels beat ATen for this class of layer: a rule from measurements.

    ``several``: there is more than one thread.

    * Dense float32 and bfloat16: ATen calls oneDNN, which wins if a call has only a few steps, or the layer is so small
      that nothing can be gained; in inference of a wide layer both are equally fast for more steps.  Measured after an
      operation of torch's for T 1 to 160, B 1, 8, 32 and H 16 to 512, on two kinds of processor: what this rule picks
      is 0.99 to 2.6 times as fast in training with two threads and 1.0 to 3.7 in inference, with one thread 1.0 to 1.6
      and 0.99 to 1.95 (AMD EPYC, Zen 3, AVX2); 0.97 to 1.9 and 1.01 to 2.5 with two threads (Intel Xeon, AVX-512).
    * What oneDNN does not cover (packed, projections, float64, float16) ATen runs step by step, at some 50
      microseconds per step; preparing arguments for each batch of lengths costs us 0.3 ms per pass.
    * bfloat16 on a CPU that multiplies it: oneDNN uses that, and so do ours.  In training they win where float32's do:
      with AMX 1.02 to 1.6 with 5 steps of 256 units and more, 1.15 to 6 from 20 steps on, with AVX512-BF16 (AMD EPYC,
      Zen 4) 0.99 to 1.6 over 30 to 50 steps and 1.3 to 20 over more.  In inference with AMX 1.0 to 4.6, of 128 units
      and more from 30 steps on, with AVX512-BF16 1.01 to 5.1, but for one row of 1024 units (0.95) and short calls of
      few units (0.89 to 1.1).  Where AMX is refused ours multiply in float32, and won while cell and overhead of a step
      outweighed the products.
    """
    steps, hidden, batch = layer.steps, layer.hidden_size, layer.batch
    if layer.ragged:
        return steps >= (10 if layer.training else 20)
    if layer.proj_size or layer.dtype not in (torch.float32, torch.bfloat16):
        return steps >= (4 if layer.training else 6)
    if layer.dtype == torch.bfloat16 and _left_in_bfloat16(layer):
        return False
    if layer.training and hidden >= 256:
        return steps >= (1 if hidden >= 512 else 4)
    wide = not layer.training and hidden >= 128 and not (hidden >= 512 and batch == 1)
    size = steps * hidden * min(batch, 16) ** 0.5
    return steps >= (20 if wide else 10) and size >= (700 if several else 1500)


def _wide_measured(layer: Layer) -> bool:
    """Whether many rows of a large H are of a class that was measured, in the kernels' design for them."""
    plain = not layer.ragged and not layer.proj_size and layer.directions == 1
    return plain and layer.dtype == torch.bfloat16 and layer.hidden_size % 8 == 0


def faster_than_cudnn(layer: Layer) -> bool:
    """Whether the Triton kernels beat cuDNN for this class of layer: a rule from measurements on ``CUDNN_MEASURED_ON``.

    * Where cuDNN launches kernels for each step (bfloat16, float32 of H > 192, packed, projections, an H that is no
      multiple of 128), a step takes it 13 microseconds forward and 27 backward for all sizes up to H 1024 and 64 rows,
      most of them on that host: ours are 2 to 14 times as fast there, and 1.4 to 3.9 times with 128 and 256 rows of
      H 512 to 1024 (dense bfloat16).  A call costs us 0.2 ms more in inference and 1 to 2 ms in training, and cuDNN
      wins where products dominate: training at H 2048 (0.97); float32 of H 1024 is equally fast.
    * Where it uses one persistent kernel (float16 of up to 128 rows, a multiple of eight, and float32 of H <= 192),
      ours are 1.03 to 3.1 times as fast over 1024 steps, except in inference of 16 rows of H 768 (0.85).
    """
    steps, hidden, batch = layer.steps, layer.hidden_size, layer.batch
    if hidden > 1024 or batch > 256:
        return False
    if hidden > 512 and batch > 64 and not _wide_measured(layer):
        return False
    if layer.dtype == torch.float32 and (hidden > 512 or batch > 64):
        return False
    stepwise = layer.ragged or layer.proj_size > 0 or layer.dtype == torch.bfloat16
    if not stepwise and hidden <= 192:
        return steps >= 1000
    if not stepwise and layer.dtype == torch.float16 and hidden % 128 == 0 and batch % 8 == 0 and batch <= 128:
        return steps >= 1000 and (layer.training or batch > 16)
    return steps >= (100 if layer.training else 32)


def aten_or_ours(layer: Layer, situation: Situation) -> Verdict:
    """Whether the Numba kernels beat ATen: by a table for this machine, else by the rule."""
    if situation.threads:  # a graph is kept, and may run on any number
        found = tuning.consult(layer, situation.threads, situation.strict)
        if isinstance(found, Verdict):
            return found
    if faster_than_aten(layer, situation.threads != 1):
        return Verdict(True, "committed rule, measured faster than ATen in this class of shape")
    return Verdict(False, "committed rule: ATen was measured faster for this class of shape")


def cudnn_or_ours(layer: Layer, situation: Situation) -> Verdict:
    """Whether the Triton kernels beat cuDNN: by a table for this device, else by the rule of the one that has one."""
    found = tuning.consult(layer, situation.threads, situation.strict)
    if isinstance(found, Verdict):
        return found
    device = machine.device(layer.device, situation.threads)
    if (device.name, device.units) != CUDNN_MEASURED_ON:
        return Verdict(False, f"{found}; backend='triton' runs the kernels")
    if faster_than_cudnn(layer):
        return Verdict(True, "committed rule, measured faster than cuDNN in this class of shape")
    return Verdict(
        False, "committed rule: cuDNN was measured faster for this class of shape, or ours was not measured on it"
    )
