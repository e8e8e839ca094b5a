"""Kernels in bfloat16 for CPUs with dot-product instructions: products of pairs of numbers, sums in float32."""
