"""Composition of callbacks. Each callback sees the state left by those before it.

``compose`` is associative, with ``compose()`` as its identity. Every callback sees every event that it subscribes to;
nothing short-circuits. The returned controls are joined by ``|``, so no request is lost.
"""

from fxtrain.fold._allowed import ALLOWED_REQUESTS as ALLOWED_REQUESTS
from fxtrain.fold._compose import Composed, compose
from fxtrain.fold._compose import as_composed as as_composed
from fxtrain.fold._handler import Handler as Handler
from fxtrain.fold._handler import Needs as Needs
from fxtrain.fold._handler import on
from fxtrain.fold._needs import needs
from fxtrain.fold._stateful import attach, slotted, stateful
from fxtrain.fold._triggers import Trigger, after, at, every, when
from fxtrain.fold._triggers import When as When
from fxtrain.fold._triggers import as_trigger as as_trigger

__all__ = [
    "Composed",
    "Trigger",
    "after",
    "at",
    "attach",
    "compose",
    "every",
    "needs",
    "on",
    "slotted",
    "stateful",
    "when",
]
