"""In-place writes that do not keep dead values.

Before Inductor overwrites a buffer, it computes all values that read it, so that they see the old contents. This
includes values that nothing reads any more, such as the intermediate results of an optimizer's update, which Inductor
has already inlined. They end up in no kernel, but most of the nodes that Inductor schedules for a step are such values.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from fxtrain._torch_internals.interface import Interface
from fxtrain._torch_internals.replaced_methods import ReplacedMethods

GRAPH = Interface("torch._inductor.graph.GraphLowering", "in-place writes that do not keep dead values")


@contextlib.contextmanager
def dead_values_skipped() -> Generator[None]:
    """A context in which Inductor, in this thread, computes only values that are still read before in-place writes.

    The kernels are the same as outside of this context.
    """
    with _METHODS.active():
        yield


def _of_live_values(mark: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(mark)
    def mark_buffer_mutated(self: Any, name: str) -> None:
        if _METHODS.are_active and name in self.name_to_users:
            # The interpreter of the graph drops each value after the last node that reads it.
            live = set(map(id, _flat(self.env.values())))
            self.name_to_users[name] = [user for user in self.name_to_users[name] if id(user) in live]
        mark(self, name)

    return mark_buffer_mutated


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Yields values, and those in lists and tuples of values."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


_METHODS = ReplacedMethods(GRAPH, {"mark_buffer_mutated": _of_live_values})
