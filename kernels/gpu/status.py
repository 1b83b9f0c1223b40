"""Error flags of a device, in memory that the host reads without synchronizing; a later call raises them."""

from __future__ import annotations

import torch
from torch import Tensor

_words: dict[torch.device, Tensor] = {}  # set by a kernel in which a wait gave up
# Counts on the device of rows whose lengths were out of range, and copies of them for the host.  They only grow, so
# that a valid call does not clear the error of an earlier one.
_wrong_lengths: dict[torch.device, tuple[Tensor, Tensor]] = {}  # (count, copy)
_reported: dict[torch.device, int] = {}  # the count at the last error that was raised


def _readable(device: torch.device) -> Tensor:
    """A zero in page-locked memory: the device writes it, the host reads it."""
    with torch.inference_mode(False):  # what is made in that mode cannot be cleared outside it
        return torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")


def word(device: torch.device) -> Tensor:
    """(1,) int32, for kernels on ``device``: they set it to 1 when a wait gives up."""
    if device not in _words:
        _words[device] = _readable(device)
    return _words[device]


def note(device: torch.device, wrong: Tensor) -> None:
    """Counts the rows that are ``wrong`` (B, 1), without waiting."""
    if device not in _wrong_lengths:
        with torch.inference_mode(False):  # what is made in that mode cannot be added to outside it
            count = torch.zeros(1, dtype=torch.int32, device=device)
            _wrong_lengths[device] = count, _readable(device)
    count, copy = _wrong_lengths[device]
    wrong = wrong.squeeze(1)
    count.index_add_(0, torch.zeros_like(wrong, dtype=torch.int64), wrong.to(torch.int32))  # atomic: streams
    copy.copy_(count, non_blocking=True)


def raise_pending(device: torch.device) -> Tensor:
    """The word for kernels on ``device``, after raising what is pending there.

    RuntimeError if an earlier call gave up waiting, ValueError if its lengths were out of range.
    """
    here = word(device)
    if here.item():
        here.zero_()
        raise RuntimeError(
            f"an LSTM kernel of an earlier call on {device} gave up waiting for another part of itself: its "
            f"results are NaN from there on. Its programs were not running at the same time, as they have to: "
            f"is the device shared with other processes (MPS), or being debugged? backend='torch' does not need it"
        )
    if device in _wrong_lengths:
        _, copy = _wrong_lengths[device]
        if copy.item() > _reported.get(device, 0):
            if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize(device)  # other layers of that call may still run: one error for all
            _reported[device] = int(copy.item())
            raise ValueError(
                f"lengths should be from 0 to T, the steps of input; those of an earlier call on {device}, or of "
                f"an earlier layer of this one, were not, and its results are NaN in the rows in question. Nothing "
                f"waits for lengths that are on the device, so this comes late. Pass them on the CPU "
                f"(lengths.cpu()) to find the call: there they are checked at once"
            )
    return here
