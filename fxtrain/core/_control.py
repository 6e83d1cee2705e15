"""The requests that callbacks return to the loop. They form a monoid, so no request can be withdrawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Never, cast

import numpy as np
import torch
from torch import Tensor

from fxtrain.core._checks import describe, did_you_mean
from fxtrain.core._field_access import refusing_assignment
from fxtrain.core._pytrees import register_node
from fxtrain.core._types import Tree

Flag = bool | Tensor
"""A Python bool, or a bool tensor of shape [] (inside the compiled step, or on a device)."""

KINDS = ("stop", "skip_final_save", "end_epoch", "evaluate", "save", "skip_batch", "skip_update", "rewind")
"""The kinds of request. All are flags except ``rewind``, which is a number of steps."""


@dataclasses.dataclass(frozen=True)
class Logged:
    """A value to publish if a flag holds.

    Args:
        value: A Python scalar, a tensor of shape [], or one of ``fxtrain.values``.
        when: Whether to publish it: a bool, or a bool tensor of shape [] if it is computed on the device.
        owner: The name of the callback that logged it, filled in by the fold.
    """

    value: Any
    when: Flag = True
    owner: str = ""


_ABSENT: Any = object()
_NO_REWIND = 0


@refusing_assignment(lambda name: f"Unite it with another: control | fxtrain.Control({name}=...).")
@dataclasses.dataclass(frozen=True, init=False, repr=False, eq=False)
class Control:
    """The requests of a callback to the loop. ``Control()`` requests nothing; ``a | b`` requests both.

    Each request maps reasons to flags. ``|`` merges the mappings and ORs the flags, so a callback can add requests
    but never clear one:

        (a | b).stop[reason] = a.stop[reason] or b.stop[reason]

    Args:
        stop: End the run after this event's fold. A flag, or a mapping from reasons to flags.
        end_epoch: End the epoch and continue with the next one.
        evaluate: Evaluate after this event's fold.
        save: Save a checkpoint of the state after the fold.
        skip_batch: Skip this batch without taking a step (at ``StepBegin``).
        skip_update: Keep parameters, optimizer state and buffers unchanged (inside the step).
        rewind: Return to a state at least this many steps old. The largest request wins.
        log: Values by name. ``Logged(value, when=flag)`` publishes a value only if its flag holds.
        reason: The reason for flags that are not mappings. It counts only if its flag is true.
        final_save: Whether a stop saves a final checkpoint. A single request with False prevents it.

    Raises:
        TypeError: If a flag is not a bool, or ``log`` not a mapping from names to values.
        ValueError: On ``|``, if both sides log the same name.

    Example:
        >>> stop = Control(stop=True, reason="loss below 0.1")
        >>> (stop | Control()).reasons("stop")
        ['loss below 0.1']
        >>> Control(stop=False, reason="never") == Control()
        True
    """

    requests: dict[str, dict[str, Any]]  # kind -> reason -> flag; kinds that are not requested are absent
    log: Mapping[str, Logged]

    def __new__(
        cls,
        positional: Never = _ABSENT,
        /,
        stop: Flag | Mapping[str, Flag] = False,
        end_epoch: Flag | Mapping[str, Flag] = False,
        evaluate: Flag | Mapping[str, Flag] = False,
        save: Flag | Mapping[str, Flag] = False,
        skip_batch: Flag | Mapping[str, Flag] = False,
        skip_update: Flag | Mapping[str, Flag] = False,
        rewind: int | Tensor | Mapping[str, int | Tensor] = _NO_REWIND,
        log: Mapping[str, object] | None = None,
        reason: str = "",
        final_save: bool = True,
        **unknown: Never,
    ) -> Control:
        # A positional-only parameter takes the place of *positional, because Python fills in the defaults of
        # keyword-only parameters one by one.
        if positional is not _ABSENT or unknown:
            raise _unexpected(positional, unknown)
        # The fast path: most callbacks request nothing at most events.
        is_empty = stop is False is end_epoch is evaluate is save is skip_batch is skip_update
        if is_empty and rewind is _NO_REWIND and not log:
            return _EMPTY
        requests: dict[str, dict[str, Any]] = {}
        flags = {"stop": stop, "end_epoch": end_epoch, "evaluate": evaluate, "save": save}
        for kind, request in {**flags, "skip_batch": skip_batch, "skip_update": skip_update}.items():
            if request is not False:
                _add_request(requests, kind, request, reason)
        if type(rewind) is not int or rewind:
            _add_request(requests, "rewind", rewind, reason)
        if not final_save and "stop" in requests:
            requests["skip_final_save"] = requests["stop"]
        return _control_of(requests, _logged(log) if log else {})

    @property
    def stop(self) -> Mapping[str, Flag]:
        return self.requests.get("stop", {})

    @property
    def skip_final_save(self) -> Mapping[str, Flag]:
        return self.requests.get("skip_final_save", {})

    @property
    def end_epoch(self) -> Mapping[str, Flag]:
        return self.requests.get("end_epoch", {})

    @property
    def evaluate(self) -> Mapping[str, Flag]:
        return self.requests.get("evaluate", {})

    @property
    def save(self) -> Mapping[str, Flag]:
        return self.requests.get("save", {})

    @property
    def skip_batch(self) -> Mapping[str, Flag]:
        return self.requests.get("skip_batch", {})

    @property
    def skip_update(self) -> Mapping[str, Flag]:
        return self.requests.get("skip_update", {})

    @property
    def rewind(self) -> Mapping[str, int | Tensor]:
        return self.requests.get("rewind", {})

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds requested, including those whose tensor flags may be false."""
        return tuple(self.requests)

    def __bool__(self) -> bool:
        """Whether anything is requested or logged. Tensor flags are not read."""
        return len(self.requests) > 0 or len(self.log) > 0  # Dynamo of torch 2.11 cannot trace bool() of a dict

    def __or__(self, other: Control) -> Control:
        if not isinstance(other, Control):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        if not other:
            return self
        if not self:
            return other
        for name, entry in other.log.items():
            if name in self.log:
                raise ValueError(
                    f"expected each name to be logged once per event, got {name!r} from {_by(self.log[name])} and from "
                    f"{_by(entry)}. Use another name in one of them."
                )
        requests = dict(self.requests)
        for kind, reasons in other.requests.items():
            requests[kind] = _unite(kind, requests[kind], reasons) if kind in requests else reasons
        return _control_of(requests, {**self.log, **other.log})

    def owned_by(self, owner: str) -> Control:
        """Returns the same requests, with ``owner`` filled in where a value has no owner or a request no reason."""
        if not self:
            return self
        requests = {
            kind: {reason or f"requested by {owner}": flag for reason, flag in reasons.items()}
            for kind, reasons in self.requests.items()
        }
        log = {k: v if v.owner else Logged(v.value, v.when, owner) for k, v in self.log.items()}
        return _control_of(requests, log)

    def gated(self, condition: Tensor) -> Control:
        """Returns the same requests, each also gated by ``condition`` (bool [])."""
        # A product gates flags and the number of steps of a rewind alike.
        requests = {
            kind: {reason: condition * flag for reason, flag in reasons.items()}
            for kind, reasons in self.requests.items()
        }
        log = {k: Logged(v.value, condition & v.when, v.owner) for k, v in self.log.items()}
        return _control_of(requests, log)

    def with_log(self, log: Mapping[str, Logged]) -> Control:
        """Returns the same requests with ``log`` as their log."""
        return _new_control(self.requests, log)  # without the length of the log, which may be read lazily

    def renamed(self, *, reason: Callable[[str], str], log: Callable[[str], str]) -> Control:
        """Returns the same requests under other reasons and logged names.

        Args:
            reason: Maps a reason to another.
            log: Maps a logged name to another.
        """
        requests = {
            kind: {reason(each): flag for each, flag in reasons.items()} for kind, reasons in self.requests.items()
        }
        return _control_of(requests, {log(name): entry for name, entry in self.log.items()})

    def any(self, kind: str) -> Flag:
        """Whether any reason of this kind holds: a bool, or a bool tensor of shape [] if one of the flags is."""
        result: Flag = False
        for flag in self.requests.get(kind, {}).values():
            result = result | flag
        return result

    def reasons(self, kind: str) -> list[str]:
        """The reasons of this kind that hold. Reads the flags, so an accelerator is synchronized with the host."""
        return [reason for reason, flag in self.requests.get(kind, {}).items() if bool(flag)]

    def __reduce__(self) -> tuple[Any, ...]:
        # By default, copy and pickle call the class without arguments and fill the result, which is the shared
        # _EMPTY here.
        return _control_of, (self.requests, self.log)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Control) and self.requests == other.requests and self.log == other.log

    def __hash__(self) -> int:
        raise TypeError("unhashable type: 'Control'. It holds mappings and tensors.")

    def __repr__(self) -> str:
        shown = [f"{kind}={reasons}" for kind, reasons in self.requests.items()]
        if self.log:
            shown.append(f"log={ {name: entry.value for name, entry in self.log.items()} }")
        return f"Control({', '.join(shown)})"


def _control_of(requests: dict[str, dict[str, Any]], log: Mapping[str, Logged]) -> Control:
    # The same object whenever nothing is requested, so that the fold recognizes it by identity.
    is_empty = len(requests) == 0 and len(log) == 0
    return _EMPTY if is_empty else _new_control(requests, log)


def _new_control(requests: dict[str, dict[str, Any]], log: Mapping[str, Logged]) -> Control:
    control = object.__new__(Control)
    object.__setattr__(control, "requests", requests)
    object.__setattr__(control, "log", log)
    return control


_EMPTY = _new_control({}, {})


_NUMPY = (np.bool_, np.integer)


def _unexpected(positional: object, unknown: Mapping[str, object]) -> TypeError:
    requests = ("stop", "end_epoch", "evaluate", "save", "skip_batch", "skip_update", "rewind")
    if unknown:
        name = next(iter(unknown))
        got = f"{name!r}.{did_you_mean(name, (*requests, 'log', 'reason', 'final_save'))}"
    else:
        got = f"{describe(positional)} without a name. Name the request, as in Control(stop=True)."
    return TypeError(f"expected requests of Control ({', '.join(requests)}), or log, reason and final_save, got {got}")


def _logged(log: Mapping[str, object]) -> dict[str, Logged]:
    if not isinstance(log, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected log to be a mapping from names to values, got {describe(log)}. Pass a dict, as in "
            'Control(log={"accuracy": accuracy}).'
        )
    for name in log:
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected the names in log to be strings, got {describe(name)}. Convert it with str.")
    return {name: value if isinstance(value, Logged) else Logged(value) for name, value in log.items()}


def _add_request(requests: dict[str, dict[str, Any]], kind: str, request: object, reason: str) -> None:
    given = cast("Mapping[str, object]", request) if isinstance(request, Mapping) else {reason: request}
    items = {name: _plain(flag) for name, flag in given.items()}
    for flag in items.values():
        _check_flag(kind, flag)
    # A Python False requests nothing, so it is dropped. A tensor stays, because its value is not read here.
    flags = {name: flag for name, flag in items.items() if isinstance(flag, Tensor) or flag}
    if flags:
        requests[kind] = flags


def _plain(flag: object) -> object:
    if isinstance(flag, Tensor | int):
        return flag
    # A comparison of numpy numbers gives a numpy bool.
    return cast(Any, flag).item() if isinstance(flag, _NUMPY) else flag


def _check_flag(kind: str, flag: object) -> None:
    if kind == "rewind":
        if isinstance(flag, bool) or not isinstance(flag, int | Tensor) or (isinstance(flag, int) and flag < 0):
            raise TypeError(
                "expected rewind to be an int of at least 0 or an int tensor, got "
                f"{describe(flag)}. Give the number of steps to go back."
            )
    elif not isinstance(flag, bool) and not (isinstance(flag, Tensor) and flag.dtype == torch.bool and flag.ndim == 0):
        raise TypeError(
            f"expected {kind} to be a bool, a bool tensor of shape [], or a mapping from reasons to these, got "
            f"{describe(flag)}. Compare first (loss < 0.1), and reduce with .any() or .all()."
        )


def _unite(kind: str, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    def join(a: Any, b: Any) -> Any:
        return _largest(a, b) if kind == "rewind" else a | b

    joined = {reason: join(first[reason], flag) if reason in first else flag for reason, flag in second.items()}
    return {**first, **joined}


def _largest(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))
    return max(a, b)


def _by(entry: Logged) -> str:
    return entry.owner or "an unnamed callback"


# Compiled steps and vmap return a Control as a pytree: flags and values are leaves, reasons and names are static.


def _flatten(control: Control) -> tuple[list[Any], Any]:
    flags = [list(reasons.values()) for reasons in control.requests.values()]
    kinds = tuple((kind, tuple(reasons)) for kind, reasons in control.requests.items())
    entries = control.log.values()
    names = tuple((name, entry.owner) for name, entry in control.log.items())
    return [flags, [entry.value for entry in entries], [entry.when for entry in entries]], (kinds, names)


def _unflatten(context: Any, children: Sequence[Tree]) -> Control:
    kinds, names = context
    flags, values, whens = children
    requests = {
        kind: dict(zip(reasons, flags_of_kind, strict=True))
        for (kind, reasons), flags_of_kind in zip(kinds, flags, strict=True)
    }
    log = {name: Logged(value, when, owner) for (name, owner), value, when in zip(names, values, whens, strict=True)}
    return _control_of(requests, log)


register_node(Control, _flatten, _unflatten)
