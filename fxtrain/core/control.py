"""Control: what a callback asks for. A monoid, so that nothing asked can be taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fxtrain.core.pytrees import register_node

Flag = bool | Tensor
"""A Python bool, or a bool tensor of shape [] (inside the compiled step, or on a device)."""

KINDS = ("stop", "unsaved", "end_epoch", "evaluate", "save", "skip_batch", "skip_update", "rewind")
"""The kinds of request. All are flags but ``rewind``, which is a number of steps."""


@dataclasses.dataclass(frozen=True)
class Logged:
    """A value to be published, and under which flag.

    Args:
        value: A number, a tensor of shape [], or one of ``fxtrain.values``.
        when: Whether to publish it. A tensor where only the device knows.
        owner: The callback that logged it; the fold fills it in.
    """

    value: Any
    when: Flag = True
    owner: str = ""


class Control:
    """What a callback asks of the loop. ``Control()`` asks for nothing; ``a | b`` asks for both.

    Each request maps reasons to flags. ``|`` unites the mappings and ORs the flags, so a later callback
    can add a request and never clear one:

        (a | b).stop[reason] = a.stop[reason] or b.stop[reason]

    Args:
        stop: End the run after this event's fold. A flag, or a mapping from reasons to flags.
        end_epoch: Go on with the next epoch.
        evaluate: Evaluate now.
        save: Save a checkpoint of the state that stands after the fold.
        skip_batch: Take no step with this batch (at ``StepBegin``).
        skip_update: Keep parameters, optimizer and buffers (inside the step).
        rewind: Return to a state at least this many steps old; the largest wins.
        log: Values by name; ``Logged(value, when=flag)`` publishes one under a flag.
        reason: Why, for flags that are not mappings. It counts only where its flag is true.
        final_save: Whether a stop saves a last checkpoint. One request without it is enough to save none.

    Raises:
        ValueError: On ``|``, if both sides log one name.

    Example:
        >>> stop = Control(stop=True, reason="loss below 0.1")
        >>> (stop | Control()).reasons("stop")
        ['loss below 0.1']
        >>> Control(stop=False, reason="never") == Control()
        True
    """

    __slots__ = (*KINDS, "log")

    stop: Mapping[str, Flag]
    unsaved: Mapping[str, Flag]
    end_epoch: Mapping[str, Flag]
    evaluate: Mapping[str, Flag]
    save: Mapping[str, Flag]
    skip_batch: Mapping[str, Flag]
    skip_update: Mapping[str, Flag]
    rewind: Mapping[str, int | Tensor]
    log: Mapping[str, Logged]

    def __init__(
        self,
        *,
        stop: Flag | Mapping[str, Flag] = False,
        end_epoch: Flag | Mapping[str, Flag] = False,
        evaluate: Flag | Mapping[str, Flag] = False,
        save: Flag | Mapping[str, Flag] = False,
        skip_batch: Flag | Mapping[str, Flag] = False,
        skip_update: Flag | Mapping[str, Flag] = False,
        rewind: int | Tensor | Mapping[str, int | Tensor] = 0,
        log: Mapping[str, Any] | None = None,
        reason: str = "",
        final_save: bool = True,
    ) -> None:
        requests = {
            "stop": _request("stop", stop, reason),
            "end_epoch": _request("end_epoch", end_epoch, reason),
            "evaluate": _request("evaluate", evaluate, reason),
            "save": _request("save", save, reason),
            "skip_batch": _request("skip_batch", skip_batch, reason),
            "skip_update": _request("skip_update", skip_update, reason),
            "rewind": _request("rewind", rewind, reason),
        }
        requests["unsaved"] = {} if final_save else requests["stop"]
        logged = {k: v if isinstance(v, Logged) else Logged(v) for k, v in log.items()} if log else {}
        _fill(self, requests, logged)

    def __or__(self, other: Control) -> Control:
        if not isinstance(other, Control):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        for name, entry in other.log.items():
            if name in self.log:
                raise ValueError(
                    f"{name!r} was logged twice at one event, by {_by(self.log[name])} and by {_by(entry)}: "
                    "log it under another name in one of them."
                )
        requests = {kind: _unite(kind, getattr(self, kind), getattr(other, kind)) for kind in KINDS}
        return _fill(object.__new__(Control), requests, {**self.log, **other.log})

    def owned(self, owner: str) -> Control:
        """The same requests; a value without an owner, or a request without a reason, gets this name."""
        requests = {
            kind: {reason or f"asked by {owner}": flag for reason, flag in getattr(self, kind).items()}
            for kind in KINDS
        }
        log = {k: v if v.owner else Logged(v.value, v.when, owner) for k, v in self.log.items()}
        return _fill(object.__new__(Control), requests, log)

    def any(self, kind: str) -> Flag:
        """Whether any reason of this kind holds: a bool, or a bool tensor where a flag is one."""
        result: Flag = False
        for flag in getattr(self, kind).values():
            result = result | flag
        return result

    def reasons(self, kind: str) -> list[str]:
        """The reasons that hold. Reads the flags: on an accelerator this waits for the device."""
        return [reason for reason, flag in getattr(self, kind).items() if bool(flag)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Control) and all(
            getattr(self, name) == getattr(other, name) for name in Control.__slots__
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # holds mappings and tensors

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"A Control is immutable; to ask for {name} as well, write control | Control({name}=...).")

    def __repr__(self) -> str:
        shown = [f"{name}={getattr(self, name)}" for name in Control.__slots__ if getattr(self, name)]
        return f"Control({', '.join(shown)})"


def _fill(control: Control, requests: Mapping[str, Mapping[str, Any]], log: Mapping[str, Logged]) -> Control:
    for kind in KINDS:
        object.__setattr__(control, kind, requests[kind])
    object.__setattr__(control, "log", log)
    return control


def _request(kind: str, asked: Any, reason: str) -> dict[str, Any]:
    items = cast(dict[str, Any], dict(asked)) if isinstance(asked, Mapping) else {reason: asked}
    for flag in items.values():
        _check_flag(kind, flag)
    # A plain "no" is the unit and leaves no trace; only the device knows what a tensor says.
    return {name: flag for name, flag in items.items() if isinstance(flag, Tensor) or flag}


def _check_flag(kind: str, flag: Any) -> None:
    if kind == "rewind":
        if isinstance(flag, bool) or not isinstance(flag, int | Tensor) or (isinstance(flag, int) and flag < 0):
            raise TypeError(f"rewind takes a number of steps, 0 or more, and got {flag!r}.")
    elif not isinstance(flag, bool) and not (isinstance(flag, Tensor) and flag.dtype == torch.bool and flag.ndim == 0):
        came = f"a {flag.dtype} tensor of shape {list(flag.shape)}" if isinstance(flag, Tensor) else repr(flag)
        raise TypeError(
            f"{kind} takes a bool, a bool tensor of shape [], or a mapping from reasons to these, and got {came}: "
            "compare first (loss < 0.1), and reduce with .any() or .all()."
        )


def _unite(kind: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Mapping[str, Any]:
    if not first or not second:
        return first or second
    join: Callable[[Any, Any], Any] = _largest if kind == "rewind" else (lambda a, b: a | b)
    united = dict(first)
    for reason, flag in second.items():
        united[reason] = join(united[reason], flag) if reason in united else flag
    return united


def _largest(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    return max(a, b)


def _by(entry: Logged) -> str:
    return entry.owner or "a callback without a name"


# A Control crosses the border of the compiled step and of vmap: flags and values are its leaves, reasons and
# names its structure.


def _flatten(control: Control) -> tuple[list[Any], Any]:
    flags = [list(getattr(control, kind).values()) for kind in KINDS]
    entries = list(control.log.values())
    children = [flags, [entry.value for entry in entries], [entry.when for entry in entries]]
    reasons = tuple(tuple(getattr(control, kind)) for kind in KINDS)
    return children, (reasons, tuple((name, entry.owner) for name, entry in control.log.items()))


def _unflatten(context: Any, children: Any) -> Control:
    reasons, names = context
    flags, values, whens = children
    requests = {
        kind: dict(zip(names_of_kind, flags_of_kind, strict=True))
        for kind, names_of_kind, flags_of_kind in zip(KINDS, reasons, flags, strict=True)
    }
    log = {name: Logged(value, when, owner) for (name, owner), value, when in zip(names, values, whens, strict=True)}
    return _fill(object.__new__(Control), requests, log)


register_node(Control, _flatten, _unflatten)
