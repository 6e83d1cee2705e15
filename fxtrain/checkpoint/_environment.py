"""The software, hardware and settings that must match for a resumed run to be bitwise equal."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata

import torch

from fxtrain.core import device_name


def environment(device: torch.device) -> dict[str, str | int]:
    """Returns the environment of this process for computations on ``device``, by name."""
    return {
        "fxtrain": metadata.version("fxtrain"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),  # the vector width determines the order of summation
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
    }


def differences(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Returns one line for each name whose value differs. A tuple in ``now`` matches any of its values."""
    possible = {name: value if isinstance(value, tuple) else (value,) for name, value in now.items()}
    return [
        f"{name}: {then[name]} at the save, {values[0]} now"
        for name, values in possible.items()
        if name in then and then[name] not in values
    ]
