"""Which parts of the compiler the installed torch supports."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable

import torch

from fxtrain._torch_internals import (
    _dispatch,
    _dynamo,
    _inductor,
    _loaders,
    _memory,
    _modules,
    _operators,
    _pytree,
    _storages,
    _tracing,
    _transforms,
)
from fxtrain._torch_internals._interface import Feature, Interface

NEWEST_TESTED = (2, 13)
"""The newest version of torch that the tests have run on."""

_ROOMS = (
    _dispatch,
    _dynamo,
    _inductor,
    _loaders,
    _memory,
    _modules,
    _operators,
    _pytree,
    _storages,
    _tracing,
    _transforms,
)

INTERFACES = {
    interface.path: interface
    for room in _ROOMS
    for interface in vars(room).values()
    if isinstance(interface, Interface)
}
"""All private interfaces that fxtrain uses, by path."""


def missing_interfaces(features: Iterable[Feature]) -> list[Interface]:
    """Returns the interfaces that these parts of the compiler need and the installed torch lacks.

    The check imports the modules that contain them, which compilation does too.
    """
    wanted = set(features)
    return [interface for interface in INTERFACES.values() if interface.feature in wanted and not interface.exists]


def is_tested() -> bool:
    """Whether the installed torch is no newer than the versions that fxtrain has been tested with."""
    numbers = re.findall(r"\d+", torch.__version__)
    return tuple(map(int, numbers[:2])) <= NEWEST_TESTED


def supports(features: Iterable[Feature]) -> bool:
    """Whether parts of the compiler work with the installed torch. If not, warns about it once in a process."""
    missing = missing_interfaces(features) if is_tested() else []
    if missing:
        _warn(f"torch {torch.__version__} lacks {missing[0].path}, which fxtrain uses for {missing[0].purpose}")
    elif not is_tested():
        _warn(f"fxtrain has been tested with torch up to {'.'.join(map(str, NEWEST_TESTED))}, got {torch.__version__}")
    return not missing and is_tested()


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"{reason}. Steps are compiled by torch.compile, with more dispatch overhead and the same results.",
        UserWarning,
        stacklevel=2,
    )
