"""Composition of callbacks. Each callback sees the state left by those before it.

``compose`` is associative, with ``compose()`` as its identity. Every callback sees every event that it subscribes to;
nothing short-circuits. The returned controls are joined by ``|``, so no request is lost.
"""

from fxtrain.fold._compose import ASKABLE as ASKABLE
from fxtrain.fold._compose import Composed as Composed
from fxtrain.fold._compose import Handler as Handler
from fxtrain.fold._compose import Needs as Needs
from fxtrain.fold._compose import as_composed as as_composed
from fxtrain.fold._compose import attach as attach
from fxtrain.fold._compose import compose as compose
from fxtrain.fold._compose import on as on
from fxtrain.fold._compose import slotted as slotted
from fxtrain.fold._compose import stateful as stateful
from fxtrain.fold._needs import needs as needs
from fxtrain.fold._triggers import Trigger as Trigger
from fxtrain.fold._triggers import after as after
from fxtrain.fold._triggers import at as at
from fxtrain.fold._triggers import every as every
from fxtrain.fold._triggers import when as when
