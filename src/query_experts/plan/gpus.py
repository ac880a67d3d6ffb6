"""What GPUs hold and reach: memory, and matrix products in bf16."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """One GPU.

    Args:
        memory: GiB that CUDA offers, as torch's out-of-memory errors name it ("GPU 0 has a total capacity of").
        tflops: Peak of dense matrix products in bf16, 10^12 FLOP/s. NVIDIA's pages give twice as much, for sparse ones.
    """

    memory: float
    tflops: float


GPUS = {
    "a100-40gb": Gpu(39.4, 312),  # https://www.nvidia.com/en-us/data-center/a100/
    "a100": Gpu(79.1, 312),  # of 80 GB
    "h100": Gpu(79.1, 989),  # SXM: https://www.nvidia.com/en-us/data-center/h100/
    "h100-pcie": Gpu(79.1, 756),
    "h200": Gpu(139.8, 989),  # https://www.nvidia.com/en-us/data-center/h200/
    "b200": Gpu(178.3, 2250),  # https://www.nvidia.com/en-us/data-center/hgx/
}
USABLE = 0.9  # of the memory, assumed: the CUDA context, NCCL's buffers and gaps between blocks take the rest
