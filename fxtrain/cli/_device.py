"""The device that a command's option names."""

from __future__ import annotations

import torch

from fxtrain.cli._errors import CommandError


def device_named(name: str, option: str) -> torch.device:
    """Returns an available device.

    Args:
        name: ``"auto"``, which is CUDA if it is available, or the name of a device.
        option: The name of the option, for errors.

    Raises:
        CommandError: The device is not available.

    Example:
        >>> device_named("cpu", "--device")
        device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta tensors have no values
    except (RuntimeError, AssertionError, ImportError) as error:
        raise CommandError(
            f"expected {option} to be available, got {name} ({str(error).splitlines()[0]}). Use cpu, cuda or auto."
        ) from None
    return device
