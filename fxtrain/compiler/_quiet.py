"""Quiet: attempts to compile a step that leave nothing of torch's own reports on the terminal."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import warnings
from collections.abc import Generator


@contextlib.contextmanager
def quietly() -> Generator[None]:
    """A context without torch's logs in this thread, and without Dynamo's warnings."""
    with without_logs(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dynamo (detected|does not know how)")
        yield


@contextlib.contextmanager
def without_logs() -> Generator[None]:
    """A context that drops what torch logs in this thread, except by loggers that ``TORCH_LOGS`` has set.

    Example:
        >>> with without_logs():
        ...     logging.getLogger("torch._dynamo").warning("a page about a graph break")
    """
    own = _OfThread(threading.get_ident())
    loggers = _loggers(len(logging.Logger.manager.loggerDict))
    handlers = list(dict.fromkeys(handler for logger in loggers for handler in logger.handlers))
    for handler in handlers:
        handler.addFilter(own)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(own)


@functools.lru_cache(maxsize=1)
def _loggers(count: int) -> list[logging.Logger]:
    """The root logger, and torch's with handlers: some of these do not propagate.

    Args:
        count: How many loggers exist. A new one is the only reason to look again.
    """
    del count
    named = [logging.getLogger(name) for name in list(logging.Logger.manager.loggerDict) if name.startswith("torch.")]
    own = [logger for logger in named if logger.handlers]
    return [logging.getLogger(), logging.getLogger("torch"), logging.getLogger("torch._dynamo"), *own]


class _OfThread(logging.Filter):
    """Drops the records of torch's loggers in one thread."""

    def __init__(self, thread: int) -> None:
        super().__init__()
        self._thread = thread

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread or not record.name.startswith("torch."):
            return True
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None and logger.name != "torch":
            if logger.level != logging.NOTSET:
                return True  # chosen by the user
            logger = logger.parent
        return False
