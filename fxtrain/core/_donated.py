"""Invalidated states: reading one raises, because its buffers were donated to a step."""

from __future__ import annotations

from typing import Any, NoReturn

from fxtrain.core._pytrees import register_node
from fxtrain.core._state import TrainState


class DonatedError(RuntimeError):
    """Raised when a state is read after its buffers were donated to a step."""


class Donated(TrainState):
    """A state that was donated to a step compiled with ``donate=True``. Reading any attribute raises."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        return _refuse(self)

    def __repr__(self) -> str:
        return f"TrainState, donated to {self.__dict__['taker']}"

    def _repr_html_(self) -> str:
        return repr(self)


def invalidate(state: TrainState, taker: str) -> None:
    """Invalidates ``state`` in place: any later access through an old reference raises ``DonatedError``.

    Args:
        state: The donated state.
        taker: The step that reuses its buffers, for the error.
    """
    fields = state.__dict__
    fields.clear()
    fields["taker"] = taker
    object.__setattr__(state, "__class__", Donated)


def _refuse(state: TrainState) -> NoReturn:
    raise DonatedError(
        f"expected a live state, got one that was donated to {state.__dict__['taker']}, which reused its buffers. Use "
        "the state that the step returned, call state.copy() before the step, or compile with donate=False."
    )


register_node(Donated, lambda state: _refuse(state), lambda context, children: _refuse(children[0]))
