"""The class of a private interface: where torch has it, and what of fxtrain depends on it."""

from __future__ import annotations

import enum
import functools
import importlib
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

    def __repr__(self) -> str:
        return f"Interface({self.path!r}, {self.purpose!r})"


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
