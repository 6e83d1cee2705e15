"""The training state: one immutable pytree of tensors.

A state whose buffers were donated to a step is invalidated: reading it raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, Self, TypeVar

import torch
from torch import Tensor

from fxtrain.core._checks import describe, did_you_mean
from fxtrain.core._field_access import missing_field, refusing_assignment
from fxtrain.core._formats import dtype_name, format_bytes
from fxtrain.core._html import html_view, view
from fxtrain.core._leaf_values import leaf_bytes, leaf_shape
from fxtrain.core._pytrees import NAMESPACE, ops, register_node
from fxtrain.core._shard import refuse_shards
from fxtrain.core._state_diff import StateDiff, state_diff
from fxtrain.core._types import Tree

S = TypeVar("S")

_SHOWN = 40  # rows in the repr of a state; one more line sums up the rest


class Due(NamedTuple):
    """The pending requests. Every leaf is a 0-d tensor on the state's device.

    The loop sets an entry when a callback requests it and clears the entry when the request is handled. A run that is
    interrupted in between resumes with the pending work.
    """

    begin_epoch: Tensor  # bool []: the next step is the first of an epoch
    rewind: Tensor  # int64 []: rewind to a state at least this many steps old; 0 for no request
    evaluate: Tensor  # bool []
    end_epoch: Tensor  # bool []
    save: Tensor  # bool []
    stop: Tensor  # bool []: a stopped state is a fixed point of the step
    skip_final_save: Tensor  # bool []: the stop makes no final save

    @classmethod
    def start(cls, device: torch.device | str | None = None) -> Due:
        """Returns the requests that are pending before the first step: the beginning of an epoch."""
        start = {"begin_epoch": True, "rewind": 0}
        return cls(*(torch.tensor(start.get(name, False), device=device) for name in cls._fields))


@refusing_assignment(lambda name: f"Make a new state: state = state.replace({name}=...).")
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class TrainState:
    """The complete state of a training run: a frozen dataclass and a pytree whose leaves are all tensors.

    It is registered with optree in the namespace ``"fxtrain"`` and with torch's own pytree, so ``torch.func``
    transforms and ``torch.compile`` accept it. Create one with ``fxtrain.init``.

    Args:
        step: int64 []. Number of steps taken.
        params: Pytree of tensors. For a module, a dict from parameter name to tensor.
        buffers: Pytree of tensors, with the structure that ``params`` has above its names.
        opt_state: Pytree of tensors: the optimizer state.
        seed: int64 []. Seed of all random samples.
        position: int64 []. Data position: number of batches consumed.
        slots: Dict from slot name to a pytree of tensors: the callback state.
        due: The pending requests.
        model: The architecture. Static: it belongs to the tree's structure and is not a leaf.

    Raises:
        TypeError: If a leaf is not a tensor. The message names its path.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 1), fx.optim.sgd(0.1), seed=0)
        >>> state.params["weight"].shape
        torch.Size([1, 2])
        >>> state.replace(params={"weight": 1.0})
        Traceback (most recent call last):
        ...
        TypeError: expected state.params['weight'] to be a tensor, got 1.0. Use torch.tensor(1.0).
    """

    step: Tensor
    params: Tree
    buffers: Tree
    opt_state: Tree
    seed: Tensor
    position: Tensor
    slots: dict[str, Tree]
    due: Due
    model: Any = None

    def __post_init__(self) -> None:
        for name in FIELDS:
            _refuse_non_tensors(name, getattr(self, name))

    def __getattr__(self, name: str) -> NoReturn:
        def remedy() -> str:
            return _ELSEWHERE.get(name) or did_you_mean(name, FIELDS).strip() or _VIEW

        raise missing_field(self, name, FIELDS, remedy)

    def replace(self, **changes: object) -> Self:
        """Returns a new state with some fields replaced. Only the new values are checked."""
        for name, value in changes.items():
            if name in FIELDS:
                _refuse_non_tensors(name, value)
            elif name != "model":
                fields = (*FIELDS, "model")
                raise TypeError(
                    f"expected a field of TrainState ({', '.join(fields)}), got {name!r}.{did_you_mean(name, fields)}"
                )
        return build(type(self), {**_fields(self), **changes})

    def with_slot(self, name: str, content: Tree) -> Self:
        """Returns a new state with the content of one slot replaced.

        Args:
            name: The slot's name. The slot is added if it does not exist.
            content: The new content, a pytree of tensors.
        """
        _refuse_non_tensors(f"slots[{name!r}]", content)
        return build(type(self), {**_fields(self), "slots": {**self.slots, name: content}})

    def copy(self) -> Self:
        """Returns a copy of the state in which every leaf is cloned."""
        return ops.tree_map(torch.clone, self, namespace=NAMESPACE)

    def diff(self, other: TrainState) -> StateDiff:
        """Returns the leaves that differ from those of another state, such as one restored from a checkpoint.

        Values are compared bitwise, except that every NaN equals every other: 0.0 differs from -0.0. The devices of the
        leaves may differ.

        Args:
            other: The other state.

        Returns:
            The differences in structure, shape, dtype and value, false if there are none. They are shown as a table.

        Raises:
            TypeError: If ``other`` is not a state.
            ValueError: If a leaf has no values, because it is on the meta device or its memory was freed.
            DonatedError: If one of the states was donated.

        Example:
            >>> import torch, fxtrain as fx
            >>> state = fx.init(torch.nn.Linear(2, 1))
            >>> state.diff(state.replace(step=torch.tensor(5), params={"bias": state.params["bias"]}))
            2 of 12 leaves differ
              state.step              0                 5        by 5
              state.params['weight']  float32 [1, 2]    missing  structure
            >>> bool(state.diff(state.copy()))
            False
        """
        if not isinstance(other, TrainState):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"expected another TrainState to compare with, got {describe(other)}. Pass a state, such as "
                "result.state."
            )
        return state_diff(self, other)

    def __repr__(self) -> str:
        rows, total = _table(self)
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"  {path:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {size:>{widths[3]}}".rstrip()
            for path, shape, dtype, size in rows
        ]
        return "\n".join([f"TrainState, {total}", *lines])

    @html_view
    def _repr_html_(self) -> str:
        from fxtrain.core._state_view import state_view  # loaded only in notebooks

        return state_view(self)


_VIEW = "The model with its weights is fxtrain.view(state)."
_METRICS = "Metrics are in the output of a step, in the events and in result.history."
_ELSEWHERE = {
    "loss": _METRICS,
    "metrics": _METRICS,
    "history": _METRICS,
    "state_dict": "Use fxtrain.state_dict(state).",
    "parameters": "The parameters are state.params.",
    "epoch": "The epoch is in the events: event.epoch.",
}

FIELDS = tuple(field.name for field in dataclasses.fields(TrainState) if field.name != "model")


def _fields(state: TrainState) -> dict[str, Any]:
    if torch.compiler.is_dynamo_compiling():  # Dynamo does not support __dict__ here in torch 2.11
        return {name: getattr(state, name) for name in (*FIELDS, "model")}
    return state.__dict__


def build(cls: type[S], fields: Mapping[str, object]) -> S:
    # Skips __init__ and its check of every leaf: transforms put shapes, specs and sentinels in the place of tensors,
    # and `replace` has already checked the new values.
    state = object.__new__(cls)
    if torch.compiler.is_dynamo_compiling():
        for name, value in fields.items():
            object.__setattr__(state, name, value)
    else:  # faster, but not supported by Dynamo
        state.__dict__.update(fields)
    return state


def _unflatten(model: object, children: Sequence[Tree]) -> TrainState:
    return build(TrainState, {**dict(zip(FIELDS, children, strict=True)), "model": model})


def _flatten(state: TrainState) -> tuple[list[Any], Any]:
    return [getattr(state, name) for name in FIELDS], state.model


register_node(TrainState, _flatten, _unflatten, fields=FIELDS)


def _refuse_non_tensors(field: str, value: object) -> None:
    if isinstance(value, Tensor) or torch.compiler.is_dynamo_compiling():  # a traced step is checked when it returns
        return
    leaves: list[Any] = ops.tree_leaves(value, namespace=NAMESPACE)
    if all(isinstance(leaf, Tensor) for leaf in leaves):
        return
    accessors = ops.tree_accessors(value, namespace=NAMESPACE)
    accessor, leaf = next((a, x) for a, x in zip(accessors, leaves, strict=True) if not isinstance(x, Tensor))
    is_scalar = isinstance(leaf, bool | int | float | complex)
    remedy = f"Use torch.tensor({leaf!r})." if is_scalar else "Convert it to a tensor, or keep it outside of the state."
    raise TypeError(f"expected {accessor.codify(f'state.{field}')} to be a tensor, got {describe(leaf)}. {remedy}")


def _table(state: TrainState) -> tuple[list[tuple[str, str, str, str]], str]:
    leaves: list[Any]
    accessors, leaves, _ = ops.tree_flatten_with_accessor(state, namespace=NAMESPACE)
    rows = [
        (accessor.codify("state"), leaf_shape(leaf), dtype_name(leaf.dtype), format_bytes(leaf_bytes(leaf)))
        if isinstance(leaf, Tensor)
        else (accessor.codify("state"), type(leaf).__name__, "", "")
        for accessor, leaf in zip(accessors, leaves, strict=True)
    ]
    sizes = [leaf_bytes(leaf) if isinstance(leaf, Tensor) else 0 for leaf in leaves]
    total = f"{len(leaves)} leaves, {format_bytes(sum(sizes))}"
    if len(rows) > _SHOWN:
        rest = format_bytes(sum(sizes[_SHOWN:]))
        rows = [*rows[:_SHOWN], (f"... and {len(leaves) - _SHOWN} more", "", "", rest)]
    return rows, total


def check_train_state(value: object, call: str, *, takes_shards: bool = False, takes_stacked: bool = False) -> None:
    """Raises TypeError unless ``value`` is a TrainState with whole tensors, of one run.

    Args:
        value: The first argument of a call.
        call: The call with its arguments in order, for the error.
        takes_shards: Whether the state may be sharded.
        takes_stacked: Whether the state may be that of several runs.

    Example:
        >>> check_train_state("runs/1", "save_weights(path, state)")
        Traceback (most recent call last):
        ...
        TypeError: expected a TrainState in save_weights(path, state), got 'runs/1'. Make one with fxtrain.init(...
    """
    if not isinstance(value, TrainState):
        raise TypeError(
            f"expected a TrainState in {call}, got {describe(value)}. Make one with fxtrain.init(module, tx), and give "
            "the arguments in this order."
        )
    if not takes_shards:
        refuse_shards(value, call)
    if not takes_stacked:
        refuse_stacked(value, call)


def refuse_stacked(state: TrainState, call: str) -> None:
    """Raises TypeError for the state of several runs.

    Args:
        state: A state.
        call: The call with its arguments in order, for the error.
    """
    if state.step.ndim:
        raise TypeError(
            f"expected the state of one run in {call}, got one of {len(state.step)} runs. Train them together with "
            "fxtrain.fit, or take one out: fxtrain.ensemble.member(state, index)."
        )


class DonatedError(RuntimeError):
    """Raised when a state is read after its buffers were donated to a step."""


class Donated(TrainState):
    """A state that was donated to a step compiled with ``donate=True``. Reading any attribute raises."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("__", "_repr_", "_ipython_")):  # the latter two are read by notebooks
            return object.__getattribute__(self, name)
        return _refuse_donated(self)

    def __repr__(self) -> str:
        return f"TrainState, donated to {self.__dict__['taker']}"

    @html_view
    def _repr_html_(self) -> str:
        return view("TrainState", note=f"donated to {self.__dict__['taker']}, which reused its memory")


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


def validate(state: TrainState, same: TrainState) -> None:
    """Makes a donated state readable again, with the leaves of a state of the same values."""
    object.__setattr__(state, "__class__", TrainState)
    fields = state.__dict__
    fields.clear()
    fields.update(same.__dict__)


def _refuse_donated(state: TrainState) -> NoReturn:
    raise DonatedError(
        f"expected a live state, got one that was donated to {state.__dict__['taker']}, which reused its buffers. Use "
        "the state that the step returned, call state.copy() before the step, or compile with donate=False."
    )


register_node(Donated, _refuse_donated, lambda context, children: _refuse_donated(children[0]))
