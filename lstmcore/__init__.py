"""A fused LSTM for long sequences, drop-in for ``torch.nn.LSTM``.

    >>> import torch, lstmcore
    >>> model = lstmcore.LSTM(8, 32)
    >>> output, (h_n, c_n) = model(torch.randn(100, 4, 8))

Importing it loads no kernel and no compiler; the first call that needs them does.
"""

from lstmcore._version import __version__
from lstmcore.backends import explain
from lstmcore.functional import lstm
from lstmcore.module import LSTM, LSTMCell

__all__ = ["LSTM", "LSTMCell", "__version__", "explain", "lstm"]
