# pyright: reportUnusedImport=false
"""Composition of callbacks. Each callback sees the state left by those before it.

``compose`` is associative, with ``compose()`` as its identity. Every callback sees every event that it subscribes to;
nothing short-circuits. The returned controls are joined by ``|``, so no request is lost.
"""

from fxtrain.fold._compose import Composed, as_composed, attach, compose
from fxtrain.fold._handler import Handler, Needs, needs, on, slotted, stateful
from fxtrain.fold._tolerant import tolerant
from fxtrain.fold._triggers import Trigger, When, after, as_trigger, at, every, of_model, when

__all__ = [
    "Composed",
    "Handler",
    "Trigger",
    "after",
    "at",
    "attach",
    "compose",
    "every",
    "needs",
    "of_model",
    "on",
    "slotted",
    "stateful",
    "tolerant",
    "when",
]
