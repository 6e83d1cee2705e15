"""The trained models with their data, shared by all contestants."""

import importlib

from benchmarks.workloads.workload import Workload as Workload

NAMES = ("tiny_mlp", "small_gpt", "wide_mlp", "digits_resnet", "many_leaves")
ON_GPU = (*NAMES, "gpt")


def workload(name: str, *, quick: bool = False, device: str = "cpu") -> Workload:
    """Returns a workload. A quick one is small and only tests the benchmark itself."""
    made: Workload = importlib.import_module(f"benchmarks.workloads.{name}").make(quick)
    return made if device == "cpu" else made.on(device)
