"""Frames: which lines of a traceback are the user's own, a library's, torch's or this library's."""

from __future__ import annotations

import functools
import os
import sysconfig
import traceback
from collections.abc import Iterable
from typing import NamedTuple

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_INTERACTIVE = ("<doctest", "<ipython", "<stdin", "<string")


class Places(NamedTuple):
    """The frames of a traceback that matter to a user.

    Args:
        own: The innermost frame of the user's own files; None if there is none.
        library: The innermost frame of an installed package other than torch, if it is inside of ``own``.
    """

    own: traceback.FrameSummary | None
    library: traceback.FrameSummary | None


def is_of_users(filename: str) -> bool:
    """Whether a file is neither Python's, nor installed, nor this library's. Code typed at a prompt is the user's.

    Example:
        >>> import os, torch
        >>> is_of_users("/home/me/train.py"), is_of_users(torch.__file__), is_of_users(os.__file__)
        (True, False, False)
    """
    if filename.startswith("<"):
        return filename.startswith(_INTERACTIVE)
    return not os.path.abspath(filename).startswith(_installed())


def places(frames: Iterable[traceback.FrameSummary]) -> Places:
    """The places of a traceback, whose innermost frame comes last."""
    own: traceback.FrameSummary | None = None
    library: traceback.FrameSummary | None = None
    for frame in frames:
        if is_of_users(frame.filename):
            own, library = frame, None
        elif _is_of_library(frame.filename):
            library = frame
    return Places(own, library)


def is_raised_by_users(error: BaseException) -> bool:
    """Whether the line that raised an error is the user's own, and not of a function that it calls."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and is_of_users(trace.tb_frame.f_code.co_filename)


def reaches_users(error: BaseException) -> bool:
    """Whether a line of the user's own is in the traceback of an error."""
    return places(traceback.extract_tb(error.__traceback__)).own is not None


def _is_of_library(filename: str) -> bool:
    path = os.path.abspath(filename)
    return path.startswith(_packages()) and not path.startswith((_OURS, _torch()))


@functools.cache
def _installed() -> tuple[str, ...]:
    return (_OURS, *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@functools.cache
def _packages() -> tuple[str, ...]:
    return tuple({sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")})


@functools.cache
def _torch() -> str:
    import torch

    return os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
