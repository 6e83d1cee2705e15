"""The fold: many callbacks as one, in order, each seeing the state that those before it left.

``compose`` is associative, and ``compose()`` is the identity. Every callback sees every event that it subscribes
to; nothing short-circuits. What each returns is joined by ``|``, so nothing asked is lost.
"""

from fxtrain.fold.compose import ASKABLE as ASKABLE
from fxtrain.fold.compose import Composed as Composed
from fxtrain.fold.compose import Handler as Handler
from fxtrain.fold.compose import Needs as Needs
from fxtrain.fold.compose import as_composed as as_composed
from fxtrain.fold.compose import attach as attach
from fxtrain.fold.compose import compose as compose
from fxtrain.fold.compose import on as on
from fxtrain.fold.compose import slotted as slotted
from fxtrain.fold.compose import stateful as stateful
from fxtrain.fold.needs import needs as needs
from fxtrain.fold.triggers import Trigger as Trigger
from fxtrain.fold.triggers import after as after
from fxtrain.fold.triggers import at as at
from fxtrain.fold.triggers import every as every
from fxtrain.fold.triggers import when as when
