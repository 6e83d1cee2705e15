"""A note for callbacks that read a metric or a slot that does not exist."""

from __future__ import annotations

from fxtrain.core import LOOP, Event, TrainState, did_you_mean, first_names
from fxtrain.core._tracebacks import reaches_users

_MAX_KEYS = 12


def note_existing_keys(error: KeyError, state: TrainState, event: Event) -> None:
    """Adds the keys of the metrics and slots to an error, if a callback looked up a key that is missing.

    Args:
        error: The error that a callback raised.
        state: The state before the event.
        event: The event.
    """
    key = error.args[0] if error.args else None
    if not isinstance(key, str) or key.startswith("expected ") or not reaches_users(error):
        return
    metrics = list(getattr(event, "metrics", {}))
    slots = [slot for slot in state.slots if not slot.startswith(LOOP)]
    evaluation = getattr(event, "evaluation", None) or {}
    remedy = did_you_mean(key, [*metrics, *slots])
    if key in evaluation:
        remedy = f" Read event.evaluation[{key!r}]."
    listed = [first_names(list(map(repr, keys)), _MAX_KEYS) for keys in (metrics, slots)]
    error.add_note(
        f"expected a key of event.metrics ({listed[0]}) or of state.slots ({listed[1]}) at "
        f"{type(event).__name__}, got {key!r}.{remedy}"
    )
