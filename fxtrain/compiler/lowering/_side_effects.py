"""Detects side effects of traced user code that a graph would not repeat: printed tensors and opened files."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import sys
import threading
import types
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from torch.overrides import TorchFunctionMode

from fxtrain._torch_internals.tracing import TRACER_MODULES
from fxtrain.core import Tree, warn
from fxtrain.core._tracebacks import is_of_users, place

_FORMATTERS = frozenset(("__repr__", "__str__", "__format__"))
# These modules open source files for tracebacks and imports, which is harmless.
_READERS_OF_CODE = frozenset(("linecache", "tokenize", "inspect", "traceback", "importlib", "warnings", "logging"))
_LOADERS = tuple(os.path.dirname(os.path.abspath(package.__file__ or "")) + os.sep for package in (np,))
_PASSED_MODULES = ("torch.serialization", *TRACER_MODULES)


class FileInTraceError(RuntimeError):
    """Traced user code opened a file. A graph would keep what was read, and would never write again."""


@contextlib.contextmanager
def detecting_side_effects() -> Generator[None]:
    """A context for a trace that detects side effects in this thread.

    Raises:
        FileInTraceError: User code opens a file, as in ``refusing_files``.

    Warns:
        UserWarning: A tensor is printed or formatted. The warning names the line and appears once.
    """
    with refusing_files(), _FormattingWarning():
        yield


@contextlib.contextmanager
def refusing_files() -> Generator[None]:
    """A context in which user code of this thread opens no files.

    Raises:
        FileInTraceError: User code opens a file, directly or through numpy or ``torch.load``. The error names the line.
    """
    thread = threading.get_ident()

    def refusing(opener: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, *args: Any, **kwargs: Any) -> Any:
            line = _users_line() if threading.get_ident() == thread else None
            if line is not None:
                raise FileInTraceError(
                    f"expected a step that opens no files while it is traced, got {file!r} opened at {line}. A "
                    "compiled step would not repeat this. Read files before the step and pass tensors in the batch. "
                    "Write files in an observer."
                )
            return opener(file, *args, **kwargs)

        return opened

    before = builtins.open, io.open, os.open
    builtins.open, io.open, os.open = map(refusing, before)
    try:
        yield
    finally:
        builtins.open, io.open, os.open = before


class _FormattingWarning(TorchFunctionMode):
    """Warns the first time that a tensor is formatted as text."""

    def __init__(self) -> None:
        super().__init__()
        self._warned = False

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Tree, ...] = (), kwargs: dict[str, Tree] | None = None
    ) -> Tree:
        if not self._warned and func.__name__ in _FORMATTERS:
            line = _users_line()
            if line is not None:
                self._warned = True
                warn(
                    f"A tensor is formatted as text at {line} while the step is traced. It has no values there, and "
                    "the line does not run again in later steps. Return the tensor as a metric instead.",
                    UserWarning,
                )
        return func(*args, **(kwargs or {}))


def _users_line() -> str | None:
    """Returns ``file:line`` of the user code that leads here, directly or through data loaders, or None."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        module, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        if module.partition(".")[0] in _READERS_OF_CODE:
            return None
        if is_of_users(file):
            return place(file, frame.f_lineno)
        if not _is_passed(module, file):
            return None
        frame = frame.f_back
    return None


def _is_passed(module: str, file: str) -> bool:
    """Whether to look for user code above this frame.

    True for data loaders, the standard library and torch function modes.
    """
    is_package = f"{os.sep}site-packages{os.sep}" in file
    return module in _PASSED_MODULES or module.startswith("fxtrain.") or file.startswith(_LOADERS) or not is_package
