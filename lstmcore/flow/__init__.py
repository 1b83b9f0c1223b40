"""Gradient flow: what a backward pass through time does to the gradient, seen, measured and explained.

``record`` is what a recording holds, ``recorder`` makes it, ``measure`` takes its figures, ``summary`` puts it into
words, ``plots`` into pictures, ``export`` into files.  ``jacobian`` takes one step apart, with the linear algebra of
``operators``; ``rnn`` is a plain recurrent network to compare with.
"""
