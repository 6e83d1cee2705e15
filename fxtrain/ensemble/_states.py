"""Stacks the states of runs, and takes them apart."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import EVALUATED, LOOP, Callback, TrainState, Tree, check_train_state, describe, dtype_name
from fxtrain.core._members import check_stacked, is_stacked, stacked_state
from fxtrain.fold import compose
from fxtrain.fold._per_member import select_settings


def stack(states: Sequence[TrainState]) -> TrainState:
    """Stacks the states of single runs along a new leading axis.

    Args:
        states: One state for each member, with the same structure, shapes and dtypes. They may differ in every value:
            parameters, seeds, and hyperparameters from ``fxtrain.optim.inject_hyperparams``.

    Returns:
        The stacked state, whose leaves have shape [members, ...]. It does not share memory with ``states``.

    Raises:
        TypeError: If ``states`` is not a list, or an element is not a TrainState.
        ValueError: If there are none, or they differ in structure, a shape or a dtype.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), tx)
        >>> runs = fx.ensemble.stack([fx.init({"w": torch.tensor(w)}, tx) for w in (0.0, 1.0)])
        >>> result = fx.fit(runs, step, [torch.tensor(1.0)], steps=1)
        >>> result.state.params["w"]
        tensor([0.2000, 1.0000])
    """
    if isinstance(states, TrainState):
        raise TypeError(
            "expected a list of the states of single runs, got a TrainState. Give [state], or more of them."
        )
    states = list(states)
    if not states:
        raise ValueError("expected the states of one or more runs, got none. Give a list of states.")
    for index, state in enumerate(states):
        check_train_state(state, f"fxtrain.ensemble.stack(states), at index {index},", takes_stacked=True)
        if state.step.ndim:
            raise ValueError(f"expected states of single runs, got one of several at index {index}. Give its members.")
    for index, state in enumerate(states[1:], start=1):
        for path, first, other in paired_leaves(states[0], state, "state"):
            if first is None or other is None or first.shape != other.shape or first.dtype != other.dtype:
                ours, theirs = ("no such leaf" if leaf is None else describe(leaf) for leaf in (first, other))
                raise ValueError(
                    f"expected states of one structure, got {ours} at {path} of the first and {theirs} at index "
                    f"{index}. Make all of them with one architecture, one tx and the same callbacks."
                )
        if tree.structure(state) != tree.structure(states[0]):
            raise ValueError(
                f"expected states of one model, got another architecture at index {index}. Make all of them with "
                "fxtrain.init of modules of one class and configuration. Modules with attributes that are not compared "
                "by value, such as objects of other classes, need one model for all: "
                "state.replace(model=states[0].model)."
            )
    return tree.map(lambda *leaves: torch.stack(leaves), *states)


def stacked(state: TrainState) -> TrainState:
    """Returns a batch state, which observers, checkpoints and ``steps`` have, as a stacked state.

    Args:
        state: A batch state. A stacked state is returned as it is.

    Raises:
        ValueError: If it is the state of one run.
    """
    check_train_state(state, "fxtrain.ensemble.stacked(state)", takes_stacked=True)
    state = stacked_state(state)
    if not is_stacked(state):
        raise ValueError(
            "expected the state of a batch of runs, got that of one run. Stack states: fxtrain.ensemble.stack."
        )
    return state


def member(state: TrainState, index: int) -> TrainState:
    """Returns the state of one member, from which a single run continues.

    Its stop is cleared, as in ``Result.continue_from``.

    Args:
        state: A stacked state, or a batch state from a checkpoint or an observer.
        index: The member. Negative indices count from the end.

    Raises:
        ValueError: If it is the state of one run.
        TypeError: If ``index`` is not an int.
        IndexError: If there is no such member.

    Example:
        >>> import torch, fxtrain as fx
        >>> runs = fx.ensemble.stack([fx.init({"w": torch.tensor(w)}) for w in (0.0, 1.0)])
        >>> fx.ensemble.member(runs, -1).params
        {'w': tensor(1.)}
    """
    state = stacked(state)
    index = index_of_member(index, check_stacked(state))
    one = tree.map(lambda leaf: leaf[index].clone(), state)
    if EVALUATED in one.slots and one.slots[EVALUATED]["step"] < 0:  # only other members were evaluated
        one = one.replace(slots={name: slot for name, slot in one.slots.items() if name != EVALUATED})
    none = torch.zeros_like(one.due.stop)
    return one.replace(due=one.due._replace(stop=none, skip_final_save=none.clone()))


def index_of_member(index: int, count: int) -> int:
    """Returns the index of a member from the first one on.

    Args:
        index: An int, or a NumPy or torch scalar of an integer dtype. Negative ones count from the end.
        count: The number of members.

    Raises:
        TypeError: If it is not an int.
        IndexError: If there is no such member.
    """
    try:
        given = operator.index(index)
    except TypeError:
        given = None
    if given is None or isinstance(index, bool):
        raise TypeError(f"expected the index of a member to be an int, got {describe(index)}. The first has index 0.")
    if not -count <= given < count:
        raise IndexError(f"expected the index of one of {count} members, got {given}. The first has index 0.")
    return given % count


@overload
def select(runs: TrainState, members: Sequence[int] | Tensor) -> TrainState: ...


@overload
def select(runs: Callback, members: Sequence[int] | Tensor) -> Callback: ...


def select(runs: TrainState | Callback, members: Sequence[int] | Tensor) -> TrainState | Callback:
    """Returns the stacked state or the callback of some members, for example of those that have not stopped.

    Stopped members take as long as others, so a run in which few members are left is faster without them::

        live = ~runs.due.stop
        few = fx.fit(select(runs, live), step, data, epochs=9, callbacks=select(callback, live))
        runs = put(runs, live, few.continue_from)

    The number of members changes, so a compiled step compiles another graph. Members are counted from 0 in each
    ``fit``, in the names that it publishes too.

    Args:
        runs: A stacked or batch state. Or a callback, which is returned with the settings of these members.
        members: Indices in the new order, int64 [n], or a mask, bool [members].

    Raises:
        TypeError: If ``members`` are neither ints nor flags.
        ValueError: If it is the state of one run, or no member is selected.
        IndexError: If there is no such member.

    Example:
        >>> import torch, fxtrain as fx
        >>> runs = fx.ensemble.stack([fx.init({"w": torch.tensor(w)}) for w in (0.0, 1.0, 2.0)])
        >>> fx.ensemble.select(runs, [2, 0]).params
        {'w': tensor([2., 0.])}
    """
    if not isinstance(runs, TrainState):
        callbacks = compose(runs)
        chosen = [select_settings(one, lambda count: _indices(members, count).tolist()) for one in callbacks.handlers]
        return compose(*chosen)
    runs = stacked(runs)
    indices = _indices(members, check_stacked(runs)).to(runs.step.device)
    return tree.map(lambda leaf: leaf[indices], runs)


def put(state: TrainState, members: Sequence[int] | Tensor, others: TrainState) -> TrainState:
    """Returns the state with some members replaced. It is the inverse of ``select``.

    Args:
        state: A stacked or batch state.
        members: As for ``select``.
        others: The stacked or batch state of as many members. Slots that ``state`` lacks are left out, and so are those
            of the loop that only one of the two has, such as the metrics of an epoch that has not ended.

    Raises:
        ValueError: If the numbers of members differ, a member is given twice, a slot of ``state`` is missing, or a
            leaf has another shape or dtype.

    Example:
        >>> import torch, fxtrain as fx
        >>> runs = fx.ensemble.stack([fx.init({"w": torch.tensor(w)}) for w in (0.0, 1.0, 2.0)])
        >>> changed = fx.ensemble.select(runs, [2]).replace(params={"w": torch.tensor([9.0])})
        >>> fx.ensemble.put(runs, [2], changed).params
        {'w': tensor([0., 1., 9.])}
    """
    state, others = stacked(state), stacked(others)
    indices = _indices(members, check_stacked(state)).to(state.step.device)
    if len(indices) != check_stacked(others):
        raise ValueError(f"expected the states of {len(indices)} members, got {check_stacked(others)}. Give as many.")
    if len(indices.unique()) < len(indices):
        raise ValueError(f"expected each member once, got {indices.tolist()}. Give one state for each.")
    slots, given = dict(state.slots), dict(others.slots)
    for name, slot in state.slots.items():
        if name == EVALUATED and name not in given:
            given[name] = tree.map(lambda leaf: _unknown(leaf, len(indices)), slot)
        elif name.startswith(LOOP) and not (name in given and _same_rows(slot, given[name])):
            del slots[name]
        elif name not in given:
            raise ValueError(
                f"expected others with the slot {name!r} of state, got "
                f"{', '.join(map(repr, others.slots)) or 'none'}. Train both with the same callbacks."
            )
    state, others = state.replace(slots=slots), others.replace(slots={name: given[name] for name in slots})

    for path, *leaves in paired_leaves(state, others, "state"):
        ours, theirs = (
            "no such leaf" if leaf is None else f"{dtype_name(leaf.dtype)} {list(leaf.shape[1:])}" for leaf in leaves
        )
        if ours != theirs:
            raise ValueError(
                f"expected others of the structure of state, got {theirs} for {ours} at {path} of each member. Make "
                "both with one architecture and one tx."
            )
    if tree.structure(state) != tree.structure(others):
        raise ValueError(
            "expected others of the model of state, got another architecture. Make both with one architecture."
        )

    def replaced(old: Tensor, new: Tensor) -> Tensor:
        return old.index_copy(0, indices, new)

    return tree.map(replaced, state, others)


def paired_leaves(one: Tree, other: Tree, root: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields the path and both leaves, or None for one, of all leaves that either pytree has.

    Example:
        >>> list(paired_leaves({"x": 1, "y": 2}, {"x": 3, "z": 4}, "batch"))
        [("batch['x']", 1, 3), ("batch['y']", 2, None), ("batch['z']", None, 4)]
    """
    ours, theirs = (dict(zip(tree.paths(each, root), tree.leaves(each), strict=True)) for each in (one, other))
    for path in dict.fromkeys((*ours, *theirs)):
        yield path, ours.get(path), theirs.get(path)


def _unknown(leaf: Tensor, count: int) -> Tensor:
    """Returns what the evaluations of members have that were not evaluated: the step -1 and metrics nan."""
    return leaf.new_full((count, *leaf.shape[1:]), float("nan") if leaf.is_floating_point() else -1)


def _same_rows(one: Tree, other: Tree) -> bool:
    """Whether the slots of two numbers of members have the same leaves, apart from their first dimensions."""
    if tree.structure(one) != tree.structure(other):
        return False
    pairs = zip(tree.leaves(one), tree.leaves(other), strict=True)
    return all(ours.shape[1:] == theirs.shape[1:] and ours.dtype == theirs.dtype for ours, theirs in pairs)


def _indices(members: Sequence[int] | Tensor, count: int) -> Tensor:
    expected = f"expected one or more indices of members, got {describe(members)}. Give ints or a mask."
    try:
        given = torch.as_tensor(members)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(expected) from error
    is_mixed = isinstance(members, list | tuple) and len(set(map(type, members))) > 1
    if is_mixed or given.dtype == torch.uint8:  # torch has taken masks of this dtype
        raise TypeError(expected)
    if given.dtype == torch.bool:
        if given.shape != (count,):
            raise ValueError(f"expected a mask of shape [{count}], got {describe(given)}. Give a flag for each member.")
        given = given.nonzero().flatten()
    if given.ndim != 1 or len(given) == 0 or given.is_floating_point():
        raise ValueError(expected)
    out = [index for index in given.tolist() if not -count <= index < count]
    if out:
        raise IndexError(f"expected indices of {count} members, got {out[0]}. The first has index 0.")
    return given % count
