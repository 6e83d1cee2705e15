"""Donated: what is left of a state whose memory a step has taken."""

from __future__ import annotations

from typing import Any, NoReturn

from fxtrain.core._pytrees import register_node
from fxtrain.core._state import TrainState


class DonatedError(RuntimeError):
    """A state was read after a step had taken its memory."""


class Donated(TrainState):
    """A state that was given to a step with ``donate=True``. Reading anything of it raises, and says who took it."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        return _refuse(self)

    def __repr__(self) -> str:
        return f"TrainState, donated to {self.__dict__['taker']}"

    def _repr_html_(self) -> str:
        return repr(self)


def bury(state: TrainState, taker: str) -> None:
    """Makes a tombstone of ``state``: whoever still has it is told, and reads nothing that is not so any more."""
    fields = state.__dict__
    fields.clear()
    fields["taker"] = taker
    object.__setattr__(state, "__class__", Donated)


def _refuse(state: TrainState) -> NoReturn:
    raise DonatedError(
        f"This state was donated to {state.__dict__['taker']}, which wrote the next one over it: go on with the state "
        "that the step returned, keep this one with state.copy() before the step, or compile with donate=False."
    )


register_node(Donated, lambda state: _refuse(state), lambda context, children: _refuse(children[0]))
