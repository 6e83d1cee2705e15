"""Attributes the frames of a traceback to the user's code, installed libraries, torch or fxtrain, and names places."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, MutableMapping
from types import FrameType
from typing import Any, NamedTuple, cast

import torch

from fxtrain.core._rank import rank

_log = logging.getLogger(__name__)

FXTRAIN_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH_FOLDER = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_INTERACTIVE = ("<doctest", "<ipython", "<stdin", "<string")


class Places(NamedTuple):
    """The frames of a traceback that matter to a user.

    Args:
        own: The innermost frame in the user's code; None if there is none.
        library: The innermost frame in an installed package other than torch and fxtrain, if it was called from
            ``own``; otherwise None.
    """

    own: traceback.FrameSummary | None
    library: traceback.FrameSummary | None


def is_of_users(filename: str) -> bool:
    """Whether a file is the user's code: not the standard library, an installed package or fxtrain.

    Code typed at a prompt or in a notebook counts as the user's.

    Example:
        >>> import os, torch
        >>> is_of_users("/home/me/train.py"), is_of_users(torch.__file__), is_of_users(os.__file__)
        (True, False, False)
    """
    if filename.startswith("<"):
        return filename.startswith(_INTERACTIVE)
    return not os.path.abspath(filename).startswith(_installed())


def is_internal(filename: str) -> bool:
    """Whether a file belongs to fxtrain, to torch, or to a package that both use to traverse pytrees."""
    return os.path.abspath(filename).startswith(_internal())


def is_standard_library(filename: str) -> bool:
    """Whether a file belongs to the standard library, or is generated code without a file.

    Example:
        >>> import contextlib
        >>> is_standard_library(contextlib.__file__), is_standard_library("<frozen importlib._bootstrap>")
        (True, True)
    """
    if filename.startswith("<"):
        return not filename.startswith(_INTERACTIVE)
    return filename.startswith(_standard_library()) and not filename.startswith(_packages())


def locals_of(frame: FrameType) -> MutableMapping[str, Any]:
    """Returns the local variables of a frame. Until Python 3.12 they lack exceptions.

    There, a frame keeps a copy of its variables once they are read. With an exception that it handles, whose traceback
    references the frame, this would keep the tensors of all frames in the traceback until a garbage collection.

    Example:
        >>> import sys
        >>> def owner(self):
        ...     return locals_of(sys._getframe())["self"]
        >>> owner(3)
        3
    """
    names = cast(MutableMapping[str, Any], frame.f_locals)
    if isinstance(names, dict) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        for name in [name for name, value in names.items() if isinstance(value, BaseException)]:
            del names[name]
    return names


def places(frames: Iterable[traceback.FrameSummary]) -> Places:
    """Finds the relevant frames of a traceback, given with the innermost frame last."""
    own: traceback.FrameSummary | None = None
    library: traceback.FrameSummary | None = None
    for frame in frames:
        if is_of_users(frame.filename):
            own, library = frame, None
        elif _is_of_library(frame.filename):
            library = frame
    return Places(own, library)


def is_raised_by_users(error: BaseException) -> bool:
    """Whether the line that raised ``error`` is in the user's code, rather than in a function that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and is_of_users(trace.tb_frame.f_code.co_filename)


def reaches_users(error: BaseException) -> bool:
    """Whether the traceback of ``error`` passes through the user's code."""
    return places(traceback.extract_tb(error.__traceback__)).own is not None


def place(filename: str, line: int | None) -> str:
    """Formats a line of code as ``<file>:<line>``. In IPython the file of a cell is its prompt, as in ``Cell In[3]:1``.

    Example:
        >>> place("train.py", 3)
        'train.py:3'
    """
    shell = ipython_shell()
    cell = None if shell is None else shell.compile.format_code_name(filename)
    return f"{filename if cell is None else ' '.join(cell)}:{line}"


def ipython_shell() -> Any:
    """Returns the running shell of IPython; None outside of IPython."""
    return getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()


def in_notebook() -> bool:
    """Whether this process is the IPython kernel of a notebook."""
    return hasattr(ipython_shell(), "kernel")


def warn(message: str, category: type[Warning]) -> None:
    """Warns at the innermost line of the user's code, or if there is none, as in a worker thread, at the caller's line.

    Of several ranks, rank 0 warns. The others have the message in the logger ``fxtrain.core``.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warn("The folder is full.", RuntimeWarning)
        >>> caught[0].filename
        '<doctest fxtrain.core._tracebacks.warn[1]>'
    """
    if rank() > 0:
        _log.info("%s: %s", category.__name__, message)
        return
    frames = enumerate(traceback.walk_stack(inspect.currentframe()), 1)
    level = next((level for level, (frame, _) in frames if is_of_users(frame.f_code.co_filename)), 2)
    warnings.warn(message, category, stacklevel=level)


def _is_of_library(filename: str) -> bool:
    path = os.path.abspath(filename)
    return path.startswith(_packages()) and not path.startswith((FXTRAIN_FOLDER, _TORCH_FOLDER))


@functools.cache
def _installed() -> tuple[str, ...]:
    # torch may be outside of the folders of packages, in one that PYTHONPATH names.
    return (FXTRAIN_FOLDER, _TORCH_FOLDER, *_standard_library(), *_packages())


@functools.cache
def _internal() -> tuple[str, ...]:
    others = ("functorch", "optree")
    return (FXTRAIN_FOLDER, _TORCH_FOLDER, *(folder + name + os.sep for folder in _packages() for name in others))


@functools.cache
def _standard_library() -> tuple[str, ...]:
    return tuple(folder + os.sep for folder in _folders("stdlib", "platstdlib"))


@functools.cache
def _packages() -> tuple[str, ...]:
    # An environment can be layered on others, as by --system-site-packages, so several folders hold packages.
    listed = {folder for folder in sys.path if os.path.basename(folder) in ("site-packages", "dist-packages")}
    return tuple(os.path.abspath(folder) + os.sep for folder in listed | _folders("purelib", "platlib"))


def _folders(*names: str) -> set[str]:
    import sysconfig

    return {sysconfig.get_path(name) for name in names}
