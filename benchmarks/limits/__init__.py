"""Counted limits of the CUDA kernels, without a GPU: `python -m benchmarks.limits`."""
