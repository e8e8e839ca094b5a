"""The CPU kernels, compiled by Numba: NumPy arrays in and out."""
