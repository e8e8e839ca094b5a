"""The first minutes on a GPU as one command, `python -m benchmarks.first_gpu_run --out DIR`: see `__main__`."""
