"""Methods and functions of torch that behave differently inside a context, in the thread that entered it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Mapping
from typing import Any

from fxtrain._torch_internals.interface import Interface

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Makes the replacement of a method, by ``functools.wraps``. Outside of the context it does the same as the method."""

_lock = threading.Lock()


class ReplacedMethods:
    """Methods of a class, or functions of a module, that are replaced once the context is first entered.

    Args:
        owner: The class or module.
        wrappers: What replaces its methods, by their names.
        needs: Other interfaces that the replacements use. If one is missing, nothing is replaced.

    Attributes:
        are_replaced: Whether they have been replaced.
    """

    def __init__(self, owner: Interface, wrappers: Mapping[str, Wrapper], *needs: Interface) -> None:
        self._owner, self._wrappers, self._needs = owner, wrappers, needs
        self._entered = threading.local()
        self.are_replaced = False

    @property
    def are_active(self) -> bool:
        """Whether this thread is inside the context."""
        return getattr(self._entered, "depth", 0) > 0

    @contextlib.contextmanager
    def active(self) -> Generator[None]:
        """The context. It can be nested."""
        if all(each.exists for each in (self._owner, *self._needs)):
            self._replace()
        depth = getattr(self._entered, "depth", 0)
        self._entered.depth = depth + 1
        try:
            yield
        finally:
            self._entered.depth = depth

    def _replace(self) -> None:
        owner = self._owner.get()
        with _lock:
            if not self.are_replaced:
                for name, wrapper in self._wrappers.items():
                    setattr(owner, name, wrapper(getattr(owner, name)))
                self.are_replaced = True
