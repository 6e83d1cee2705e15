"""The device that a command's option names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxtrain.cli._errors import CommandError

if TYPE_CHECKING:
    from fxtrain.distributed import Mesh


def device_named(name: str, option: str, ranks: Mesh | None = None) -> torch.device:
    """Returns an available device.

    Args:
        name: ``"auto"``, which is CUDA if it is available, or the name of a device.
        option: The name of the option, for errors.
        ranks: The ranks of the command, each of which has a device.

    Raises:
        CommandError: The device is not available, or is not that of the ranks.

    Example:
        >>> device_named("cpu", "--device")
        device(type='cpu')
    """
    if ranks is not None:
        if name not in ("auto", ranks.device.type):
            raise CommandError(f"expected {option} to be auto or {ranks.device.type}, that of the ranks, got {name}.")
        return ranks.device
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
