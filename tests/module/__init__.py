"""``lstmcore.LSTM``, ``LSTMCell`` and ``lstm``: against torch.nn.LSTM, and what callers may do to them."""
