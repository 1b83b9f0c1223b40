"""The Numba kernels: threads and processes, compilation, plans, the same bits."""
