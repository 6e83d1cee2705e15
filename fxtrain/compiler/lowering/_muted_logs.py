"""Contexts that hide torch's logs and warnings while a step is compiled."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import warnings
from collections.abc import Generator

from fxtrain._torch_internals.dynamo import LOGGER


@contextlib.contextmanager
def without_torch_messages() -> Generator[None]:
    """A context without torch's logs in this thread and without Dynamo's warnings."""
    with without_torch_logs(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dynamo (detected|does not know how)")
        yield


@contextlib.contextmanager
def without_torch_logs() -> Generator[None]:
    """A context that drops torch's log records in this thread, except from loggers set by ``TORCH_LOGS``.

    Example:
        >>> with without_torch_logs():
        ...     logging.getLogger("torch._dynamo").warning("a page about a graph break")
    """
    own = functools.partial(_is_shown, threading.get_ident())
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
    """Returns the root logger and those of torch's loggers that have handlers, some of which do not propagate.

    Args:
        count: The number of existing loggers. It is the key of the cache: only a new logger changes the result.
    """
    del count
    named = [logging.getLogger(name) for name in list(logging.Logger.manager.loggerDict) if name.startswith("torch.")]
    own = [logger for logger in named if logger.handlers]
    return [logging.getLogger(), logging.getLogger("torch"), logging.getLogger(LOGGER), *own]


def _is_shown(thread: int, record: logging.LogRecord) -> bool:
    """Whether a log record is not torch's in this thread, or the user has set the level of its logger."""
    if record.thread != thread or not record.name.startswith("torch."):
        return True
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None and logger.name != "torch":
        if logger.level != logging.NOTSET:
            return True
        logger = logger.parent
    return False
