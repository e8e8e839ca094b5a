"""The CUDA kernels in Python, compiled by Numba: for GPUs without CuPy, and for readers."""
