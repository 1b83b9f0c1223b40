"""Torch's own classes, whatever :func:`lstmcore.install` puts in their place in ``torch.nn``."""

from torch.nn import LSTM, LSTMCell

BOTH = (LSTM, LSTMCell)
