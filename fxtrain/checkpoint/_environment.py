"""The environment: what must be equal for a resumed run to be bitwise equal to an uninterrupted one."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """What of it can be seen from here, on a device."""
    on_gpu = device.type == "cuda"
    return {
        "fxtrain": metadata.version("fxtrain"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),  # vector width: sums are taken in its order
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, one line each. Any value of a tuple in ``now`` is equal to it."""
    possible = {name: value if isinstance(value, tuple) else (value,) for name, value in now.items()}
    return [
        f"{name}: {then[name]} at the save, {values[0]} now"
        for name, values in possible.items()
        if name in then and then[name] not in values
    ]
