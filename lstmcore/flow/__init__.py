"""Gradient flow: what a backward pass through time does to the gradient, seen, measured and explained.

``record`` is what a recording holds, ``recorder`` makes it, ``summary`` puts it into words, ``plots`` into pictures,
``export`` into files; ``jacobian`` takes one step apart; ``tasks`` and ``demo`` are ``python -m lstmcore flow``.
"""
