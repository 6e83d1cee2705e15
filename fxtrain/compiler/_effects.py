"""Effects that a graph would not repeat: prints of tensors, and files, where code of users is traced."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from torch.overrides import TorchFunctionMode

from fxtrain.core._frames import is_of_users

_SHOWN = frozenset(("__repr__", "__str__", "__format__"))
# They read sources of code, for tracebacks and imports.
_READERS_OF_CODE = frozenset(("linecache", "tokenize", "inspect", "traceback", "importlib", "warnings", "logging"))
_LOADERS = tuple(os.path.dirname(os.path.abspath(package.__file__ or "")) + os.sep for package in (np,))
_PASSED = ("torch.serialization", "torch.overrides", "torch._tensor", "torch.fx.experimental.proxy_tensor")


class FileInTraceError(RuntimeError):
    """A traced step opened a file: a graph would keep what was read, and would not write again."""


@contextlib.contextmanager
def effects_noticed() -> Generator[None]:
    """A context for a trace, of this thread alone.

    Raises:
        FileInTraceError: When code of users opens a file, directly or through numpy or ``torch.load``. The error names
            the line.

    Warns:
        UserWarning: Once, when a tensor is printed or formatted, with the line.
    """
    thread = threading.get_ident()

    def refusing(opener: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, *args: Any, **kwargs: Any) -> Any:
            line = _users_line() if threading.get_ident() == thread else None
            if line is not None:
                raise FileInTraceError(
                    f"expected a step that reads nothing but its arguments while it is traced, got {file!r} opened at "
                    f"{line}, which a compiled step would not repeat. Read files before the step and pass tensors in "
                    "the batch, and write them in an observer."
                )
            return opener(file, *args, **kwargs)

        return opened

    before = builtins.open, io.open, os.open
    builtins.open, io.open, os.open = map(refusing, before)
    try:
        with _Shown():
            yield
    finally:
        builtins.open, io.open, os.open = before


class _Shown(TorchFunctionMode):
    """Warns of the first tensor that is shown as text."""

    def __init__(self) -> None:
        super().__init__()
        self._warned = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._warned and func.__name__ in _SHOWN:
            line = _users_line()
            if line is not None:
                self._warned = True
                warnings.warn(
                    f"A tensor is shown as text at {line} while the step is traced: it has no values there, and the "
                    "line does not run again in later steps. Return what is to be seen as a metric.",
                    UserWarning,
                    stacklevel=2,
                )
        return func(*args, **(kwargs or {}))


def _users_line() -> str | None:
    """``file:line`` of the users' code that leads here through loaders of data alone."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        module, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        if module.partition(".")[0] in _READERS_OF_CODE:
            return None
        if is_of_users(file):
            return f"{file}:{frame.f_lineno}"
        if not _is_passed(module, file):
            return None
        frame = frame.f_back
    return None


def _is_passed(module: str, file: str) -> bool:
    """Whether callers are looked for beyond this frame: loaders, the standard library, and modes of torch functions."""
    is_package = f"{os.sep}site-packages{os.sep}" in file
    return module in _PASSED or module.startswith("fxtrain.") or file.startswith(_LOADERS) or not is_package
