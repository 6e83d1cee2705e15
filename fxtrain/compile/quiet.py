"""Quiet: attempts to compile a step that leave nothing of torch's own reports on the terminal."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Generator


@contextlib.contextmanager
def quietly() -> Generator[None]:
    """A context without torch's logs in this thread, and without Dynamo's warnings."""
    with without_logs(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dynamo detected")
        yield


@contextlib.contextmanager
def without_logs() -> Generator[None]:
    """A context that drops what torch logs in this thread, except by loggers that ``TORCH_LOGS`` has set.

    Example:
        >>> with without_logs():
        ...     logging.getLogger("torch._dynamo").warning("a page about a graph break")
    """
    own = _OfThread(threading.get_ident())
    handlers = [*logging.getLogger("torch").handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(own)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(own)


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
