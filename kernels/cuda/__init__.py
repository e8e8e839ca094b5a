"""The CUDA kernels: their source, the configurations they are compiled in, and the launches of a call."""
