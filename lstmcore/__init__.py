"""A fused LSTM for long sequences, drop-in for ``torch.nn.LSTM``.

    >>> import torch, lstmcore
    >>> model = lstmcore.LSTM(8, 32)
    >>> output, (h_n, c_n) = model(torch.randn(100, 4, 8))
    >>> with lstmcore.record_gradient_flow(model) as flow:
    ...     model(torch.randn(100, 4, 8))[0][-1].sum().backward()
    >>> print(flow.summary())  # doctest: +ELLIPSIS
    Gradient flow of 1 layer in 1 recorded backward pass, sequences of 100 steps...

Importing it loads no kernel and no compiler; the first call that needs them does.
"""

from lstmcore import flops, importing, init, opacus
from lstmcore._version import __version__
from lstmcore.flow.jacobian import cell_jacobian, rnn_jacobian
from lstmcore.flow.recorder import record_gradient_flow
from lstmcore.flow.rnn import RNN
from lstmcore.functional import lstm
from lstmcore.models import explain, install, installed, patch, uninstall, unpatch
from lstmcore.module import LSTM, LSTMCell
from lstmcore.stream import Stream
from lstmcore.truncation import truncated

__all__ = [
    "LSTM",
    "RNN",
    "LSTMCell",
    "Stream",
    "__version__",
    "cell_jacobian",
    "explain",
    "flops",
    "init",
    "install",
    "installed",
    "lstm",
    "patch",
    "record_gradient_flow",
    "rnn_jacobian",
    "truncated",
    "uninstall",
    "unpatch",
]

importing.after("torch.utils.flop_counter", flops.register)
importing.after("opacus", opacus.register)
