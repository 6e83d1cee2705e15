"""Many runs as one: states stacked along a leading axis, which ``fit`` trains as a batch.

``stack`` makes the batch, and ``fit`` and ``evaluate`` take it in place of the state of one run, with the step, the
callbacks and the evaluation step of one run. Each member is the run that it would be alone: it has its own
hyperparameters, callback state, metrics and stop. A member that has stopped is frozen, and the batch ends when all have
stopped or a limit is reached.

The members share the step, the data position and, unless the data are ``per_member``, the batches. Their data order is
that of the first member's seed. An evaluation or a save that one member requests is one of the batch, and only members
that requested the evaluation see its events. A rewind, the end of an epoch and a skipped batch move the data position,
so all members must request them together. Members that have stopped stay as they are in a rewind, and in a later
``fit`` of the result, so they can be left out by ``select``.

A metric ``loss`` is published as its mean ``loss`` over the members, ``loss/min``, ``loss/max``, and
``loss/member_<index>`` for each. A member that has stopped has the value nan in training metrics.

Observers, checkpoints and ``steps`` see a batch state: its counters are those of the batch, and all other leaves are
stacked. ``member`` and ``stacked`` accept it too. A stacked state is saved as a batch state, and ``restore`` returns it
as a stacked one if ``like`` is stacked.
"""

from fxtrain.ensemble._callbacks import across, each
from fxtrain.ensemble._data import per_member
from fxtrain.ensemble._results import best, history
from fxtrain.ensemble._states import member, put, select, stack, stacked

__all__ = [
    "across",
    "best",
    "each",
    "history",
    "member",
    "per_member",
    "put",
    "select",
    "stack",
    "stacked",
]
