"""A GPT with the dimensions of the smallest GPT-2, for GPUs."""

from benchmarks.workloads.small_gpt import gpt
from benchmarks.workloads.workload import Workload


def make(quick: bool) -> Workload:
    size = (2, 64, 4, 256, 2, 32) if quick else (12, 768, 12, 50304, 8, 512)
    return gpt("gpt", *size, about="compute on a GPU", turn=10)
