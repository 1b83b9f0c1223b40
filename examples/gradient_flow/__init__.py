"""What becomes of a gradient in a plain RNN and in an LSTM, and what each can learn: ``python -m lstmcore flow``.

``tasks`` are problems whose answer lies far back, ``training`` holds the models and how they are trained, ``report``
writes tables and pictures, ``demo`` runs it all, and ``command`` reads the options.
"""
