"""The Triton kernels: interpreted on the CPU, and on a GPU where there is one (test_cuda.py)."""
