"""Which parts of the compiler the installed torch supports."""

from __future__ import annotations

import functools
import re
import warnings

import torch

from fxtrain._torch_internals.interface import INTERFACES, Feature, Interface

NEWEST_TESTED = (2, 13)
"""The newest version of torch that the tests have run on."""


def missing_interfaces(features: Feature) -> list[Interface]:
    """Returns the interfaces that parts of the compiler need and the installed torch lacks.

    Imports the modules that contain them, as compilation does.
    """
    needed = [interface for interface in INTERFACES.values() if interface.feature and interface.feature in features]
    return [interface for interface in needed if not interface.exists]


def is_tested() -> bool:
    """Whether the installed torch is not newer than the versions that fxtrain has been tested with."""
    return tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) <= NEWEST_TESTED


def supports(features: Feature) -> bool:
    """Whether parts of the compiler work with the installed torch. If not, warns about it once in a process."""
    if not features:
        return True
    if not is_tested():
        newest = ".".join(map(str, NEWEST_TESTED))
        _warn(f"fxtrain has been tested with torch up to {newest}, and this is torch {torch.__version__}")
        return False
    missing = missing_interfaces(features)
    if missing:
        _warn(f"torch {torch.__version__} lacks {missing[0].path}, which fxtrain uses for {missing[0].purpose}")
    return not missing


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}. Steps are compiled by torch.compile instead, with the same results and more dispatch overhead.",
        UserWarning,
        stacklevel=3,
    )
