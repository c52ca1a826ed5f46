"""The GPUs of `igrpo.site.gpu`: memory, bandwidth, arithmetic.

Peaks stand in NVIDIA's data sheets of the A100 and the H100, SXM, dense bf16. Memory is what the
driver offers to PyTorch (`torch.cuda.get_device_properties(0).total_memory`), below the name's.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
GB = 10**9


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU: bytes, bytes a second, bf16 operations a second."""

    name: str
    memory: int
    bandwidth: float
    bf16_flops: float
    cuda_arch: str


GPUS: dict[str, GPU] = {
    "a100_40gb": GPU("A100-40GB", round(39.5 * GIB), 1555e9, 312e12, "8.0"),
    "a100_80gb": GPU("A100-80GB", round(79.2 * GIB), 2039e9, 312e12, "8.0"),
    "h100_80gb": GPU("H100-80GB", round(79.1 * GIB), 3350e9, 989e12, "9.0"),
}

CUDA_CONTEXT = round(0.6 * GIB)
"""Driver context, kernels and cuBLAS workspaces of a process. An allowance, not a measurement."""
NCCL_BUFFERS = round(1.4 * GIB)
"""Channels of the process groups of one rank: data, tensor, refit. An allowance likewise."""
