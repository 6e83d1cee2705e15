"""The small GPT with twice as many layers, which shows what a layer adds to the first step."""

from benchmarks.workloads.small_gpt import gpt
from benchmarks.workloads.workload import Workload


def make(quick: bool) -> Workload:
    size = (2, 32, 4, 64, 2, 16) if quick else (8, 128, 4, 512, 8, 64)
    return gpt("deep_gpt", *size, about="compilation", turn=10)
