"""What GPUs hold and reach: memory, and matrix products in bf16."""

from __future__ import annotations

from typing import NamedTuple

from query_experts.common.device import PEAKS


class Gpu(NamedTuple):
    """One GPU.

    Args:
        memory: GiB that CUDA offers, as torch's out-of-memory errors name it ("GPU 0 has a total capacity of").
        tflops: Peak of dense matrix products in bf16, 10^12 FLOP/s.
    """

    memory: float
    tflops: float


GPUS = {
    "a100-40gb": Gpu(39.4, PEAKS["A100"] / 1e12),
    "a100": Gpu(79.1, PEAKS["A100"] / 1e12),  # of 80 GB
    "h100": Gpu(79.1, PEAKS["H100"] / 1e12),  # SXM
    "h100-pcie": Gpu(79.1, PEAKS["H100 PCIe"] / 1e12),
    "h200": Gpu(139.8, PEAKS["H200"] / 1e12),
    "b200": Gpu(178.3, PEAKS["B200"] / 1e12),
}
USABLE = 0.9  # of the memory, assumed: the CUDA context, NCCL's buffers and gaps between blocks take the rest
