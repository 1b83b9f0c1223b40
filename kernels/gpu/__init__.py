"""The Triton kernels and their host code; ``backend.py`` answers the contract of :mod:`lstmcore.kernels`."""
