"""The backend `cupy`: the kernels of `kernels/cuda` on CUDA tensors, compiled by CuPy at the first call."""

from ccgpu.bridges.cupy_cuda.attention import backward, forward
from ccgpu.bridges.cupy_cuda.device import why_not
from ccgpu.bridges.cupy_cuda.stages import affinity, aggregate, aggregate_transposed

__all__ = ["affinity", "aggregate", "aggregate_transposed", "backward", "forward", "why_not"]
