"""The dtype rules of Inductor's operations, made once.

Inductor determines the dtype of an operation's result by an object with one rule per operation. All uses share one
object, but each makes all of its rules again: several hundred for every operation that Inductor generates.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Any

from fxtrain._torch_internals.interface import Interface
from fxtrain._torch_internals.replaced_methods import ReplacedMethods

HANDLER = Interface("torch._inductor.dtype_propagation.DtypePropagationOpsHandler", "dtype rules that are made once")
SOURCE = Interface("torch._inductor.utils.op_dtype_propagation_rules", "dtype rules that are made once")

_MADE = "fxtrain_source"
"""The attribute of the object with the rules from which its own were made."""


@contextlib.contextmanager
def dtype_rules_kept() -> Generator[None]:
    """A context in which Inductor, in this thread, makes its dtype rules again only if there are new ones."""
    with _METHODS.active():
        yield


def _made_once(make: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(make)
    def initialize(self: Any) -> None:
        # Rules are added and replaced when operators are registered.
        source = SOURCE.get() if _METHODS.are_active else None
        if source is None or vars(self).get(_MADE) != source:
            make(self)
            vars(self)[_MADE] = None if source is None else dict(source)

    return initialize


_METHODS = ReplacedMethods(HANDLER, {"__init__": _made_once}, SOURCE)
