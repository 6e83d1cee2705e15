"""Private interfaces: where torch has each, what of fxtrain depends on it, and whether the installed torch suffices."""

from __future__ import annotations

import enum
import functools
import importlib
import re
import warnings
from typing import Any

import torch


class Feature(enum.Flag):
    """Parts of the compiler, each of which works only with all of its interfaces."""

    TRACED = enum.auto()  # steps as graphs from make_fx
    SYMBOLIC = enum.auto()  # with symbolic sizes
    INDUCTOR = enum.auto()  # compiled by Inductor
    AHEAD = enum.auto()  # ahead of time


class MissingInterfaceError(RuntimeError):
    """The installed torch lacks a private interface that fxtrain uses."""


class UnsupportedError(RuntimeError):
    """A part of the compiler does not work with the installed torch, of which ``supports`` has warned."""


class Interface:
    """A private interface of torch, looked up at its first use.

    Args:
        path: Its dotted path.
        purpose: What it is used for, as a noun.
        feature: The part of the compiler that cannot work without it. None if there is a fallback.

    Example:
        >>> INTERFACES["torch._foreach_copy_"].exists
        True
    """

    __slots__ = ("feature", "path", "purpose")

    def __init__(self, path: str, purpose: str, feature: Feature | None = None) -> None:
        self.path, self.purpose, self.feature = path, purpose, feature
        INTERFACES[path] = self

    @property
    def exists(self) -> bool:
        """Whether the installed torch has it."""
        return _found(self.path) is not _MISSING

    def get(self) -> Any:
        """Returns it.

        Raises:
            MissingInterfaceError: The installed torch does not have it.
        """
        found = _found(self.path)
        if found is _MISSING:
            raise MissingInterfaceError(
                f"expected a torch with {self.path} for {self.purpose}, got torch {torch.__version__}. Install a "
                "version of torch that fxtrain has been tested with."
            )
        return found


INTERFACES: dict[str, Interface] = {}
"""All private interfaces that fxtrain uses, by path."""

_MISSING = object()


@functools.cache
def _found(path: str) -> object:
    """Returns the object at a dotted path, importing modules on the way, or ``_MISSING``."""
    found: object = torch
    names = path.split(".")
    for depth, name in enumerate(names[1:], 2):
        try:
            found = getattr(found, name)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(names[:depth]))
            except ImportError:
                return _MISSING
    return found


NEWEST_TESTED = (2, 13)
"""The newest version of torch that the tests have run on."""


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
    # The lookup imports the modules that contain the interfaces, as compilation does.
    missing = [each for each in INTERFACES.values() if each.feature and each.feature in features and not each.exists]
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
