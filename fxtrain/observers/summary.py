"""Summary: one page that says what is about to be trained."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TextIO

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import NAMESPACE, Control, FitBegin, TrainState, ops
from fxtrain.observers.figures import size

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name


def summary(*, rows: int = 30, file: TextIO | None = None) -> Callable[..., None]:
    """Prints the parameters of the state, as a table of clu's ``parameter_overview``, and what the run is to be.

    A model of more than ``rows`` parameters is shown in less detail: layers that differ in their number only become
    one row, and if that is not enough, so do the parameters below one name.

    Args:
        rows: At most so many in the table, 1 or more.
        file: Where to write; standard output by default.

    Raises:
        ValueError: If ``rows`` is below 1.

    Example:
        >>> import torch, fxtrain as fx
        >>> show = summary()
        >>> show(fx.init(torch.nn.Linear(3, 2)), FitBegin(step=0, total_steps=10), Control())
        +--------+--------+---------+------+
        | Name   | Shape  | Dtype   | Size |
        +--------+--------+---------+------+
        | bias   | (2,)   | float32 | 2    |
        | weight | (2, 3) | float32 | 6    |
        +--------+--------+---------+------+
        parameters  8 in 2 tensors, 32 B
        state       70 B: params 32 B, the rest 38 B
        device      cpu
        run         10 steps, seed 0
    """
    if rows < 1:
        raise ValueError(f"rows={rows!r}: at least 1 row is wanted.")

    def summary(state: TrainState, event: FitBegin, control: Control) -> None:
        print(_page(state, event, rows), file=file, flush=True)

    return summary


def _page(state: TrainState, event: FitBegin, rows: int) -> str:
    facts = {
        "parameters": _parameters(state),
        "state": _memory(state),
        "device": _device(state.step.device),
        "run": _run(state, event),
    }
    return "\n".join([_table(state.params, rows), *(f"{label:<10}  {text}" for label, text in facts.items())])


@dataclasses.dataclass(frozen=True)
class _Row:
    name: str
    shape: str
    dtype: str
    size: int


def _table(params: Any, rows: int) -> str:
    try:
        from clu import parameter_overview  # imports jax, and starts no backend of it
    except ImportError as error:
        return f"(no table of the parameters, as clu cannot be imported: {error}; pip install clu)"
    shown = _fitting([(_name(path), leaf) for path, leaf in _with_paths(params)], rows)
    return parameter_overview.make_table(shown, column_names=[field.name for field in dataclasses.fields(_Row)])


def _fitting(leaves: list[tuple[str, Tensor]], rows: int) -> list[_Row]:
    """One row for each leaf, or for each group of alike leaves, in the least coarse way that fits."""
    if len(leaves) <= rows:
        return [_row(name, [leaf]) for name, leaf in leaves]
    starred = [(_NUMBER.sub("*", name), leaf) for name, leaf in leaves]
    grouped = _groups(starred, lambda name, leaf: (name, leaf.shape, leaf.dtype))
    depth = max(name.count(".") for name, _ in starred)
    while len(grouped) > rows and depth:
        grouped = _groups(starred, lambda name, leaf, depth=depth: ".".join(name.split(".")[:depth]))
        depth -= 1
    shown = [_row(key if isinstance(key, str) else key[0], group) for key, group in grouped.items()]
    if len(shown) > rows:
        rest = shown[rows - 1 :]
        shown = [*shown[: rows - 1], _Row(f"and {len(rest)} more", "", "", sum(row.size for row in rest))]
    return shown


def _groups(leaves: list[tuple[str, Tensor]], key: Callable[[str, Tensor], Any]) -> dict[Any, list[Tensor]]:
    groups: dict[Any, list[Tensor]] = {}
    for name, leaf in leaves:
        groups.setdefault(key(name, leaf), []).append(leaf)
    return groups


def _row(name: str, group: list[Tensor]) -> _Row:
    shapes, dtypes = {tuple(leaf.shape) for leaf in group}, {_dtype(leaf) for leaf in group}
    if len(shapes) > 1:
        shape = f"{len(group)} tensors"
    else:
        shape = f"{len(group)} x {shapes.pop()}" if len(group) > 1 else str(shapes.pop())
    return _Row(name, shape, ", ".join(sorted(dtypes)), sum(leaf.numel() for leaf in group))


def _parameters(state: TrainState) -> str:
    leaves = tree.leaves(state.params)
    count = sum(leaf.numel() for leaf in leaves)
    text = f"{count:,} in {len(leaves):,} tensor{'s' if len(leaves) != 1 else ''}, {size(_bytes(leaves))}"
    trainable = getattr(state.model, "trainable", None)  # a mask like the parameters, where the state has a model
    if trainable is not None:
        masked = tree.leaves(tree.map(lambda keep, leaf: 0 if keep else leaf.numel(), trainable, state.params))
        frozen = sum(masked)
        text += f", {frozen:,} of them frozen" if frozen else ""
    return text


def _memory(state: TrainState) -> str:
    parts = {name: _bytes(getattr(state, name)) for name in ("params", "buffers", "opt_state", "slots")}
    whole = _bytes(state)
    named = [f"{name} {size(count)}" for name, count in parts.items() if count]
    return f"{size(whole)}: {', '.join([*named, f'the rest {size(whole - sum(parts.values()))}'])}"


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _run(state: TrainState, event: FitBegin) -> str:
    length = f" of {event.epoch_length:,} batches" if event.epoch_length is not None else ""
    parts = [
        f"{event.total_steps:,} steps" if event.total_steps is not None else "",
        f"{event.total_epochs:,} epochs{length}" if event.total_epochs is not None else "",
        f"from step {event.step:,}" if event.step else "",
        f"seed {int(state.seed)}",
    ]
    return ", ".join(filter(None, parts))


def _with_paths(params: Any) -> list[tuple[tuple[Any, ...], Tensor]]:
    return list(zip(ops.tree_paths(params, namespace=NAMESPACE), tree.leaves(params), strict=True))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _dtype(leaf: Tensor) -> str:
    return str(leaf.dtype).removeprefix("torch.")


def _bytes(values: Any) -> int:
    return sum(leaf.nbytes for leaf in tree.leaves(values))
