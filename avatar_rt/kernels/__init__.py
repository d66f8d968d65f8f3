"""Triton kernels: launchers that take torch tensors and allocate their outputs, one module per op family.

Nothing here is imported until an op needs it; ``avatar_rt.ops`` decides when that is.
"""
