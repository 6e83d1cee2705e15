"""A page about the model, data, optimizer and device of a run."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxtrain import tree
from fxtrain.core import (
    TRACED,
    Control,
    FitBegin,
    TrainState,
    check_positive_int,
    device_name,
    dtype_name,
    format_bytes,
    pluralize,
    printable,
    truncate_middle,
)
from fxtrain.disk import make_folder, replace_file
from fxtrain.observers._rank_zero import rank
from fxtrain.optim import PerParameter

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a number between the dots of a name
_MAX_NAME_LENGTH = 48  # characters of a name in a table
_RIGHT_ALIGNED = ("parameters", "share", "size")  # columns
_LINE_WIDTH = 96  # characters per line outside tables

Rows = dict[str, str]
"""Known facts by label. Unknown ones are left out."""


def summary(
    *, depth: int = 2, rows: int = 30, file: str | os.PathLike[str] | TextIO | None = None
) -> Callable[..., None]:
    """Prints a page about the run when a session begins: length, model, data, optimizer, processes and device.

    It ends with a table of modules. Shared parameters are counted once, under the first of their names. Facts that
    neither the state nor the event contains are left out. With several processes, only rank 0 prints.

    If there are more than ``rows`` modules, similar ones that differ only in their index are merged into one row. If
    that is not enough, the deepest modules are left out. A model with at most ``rows`` tensors, or without submodules,
    also gets a table of its tensors.

    Args:
        depth: How many levels of modules to list below the model, at least 1.
        rows: Maximum number of rows in a table, at least 1.
        file: A path, which each session overwrites and whose folder is created if needed, or an output stream.
            Defaults to standard output.

    Raises:
        TypeError: ``rows`` or ``depth`` is not an int.
        ValueError: ``rows`` or ``depth`` is smaller than 1.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(3, 2), fx.optim.adam(1e-3))
        >>> summary()(state, FitBegin(step=0, total_steps=10), Control())
        run
          length       10 steps
          seed         0
        model
          parameters   8 in 2 tensors, all trainable
          dtype        float32
          state        150 B: params 32 B, opt_state 80 B, other 38 B
        training
          optimizer    ScaleByAdamState 80 B
        distributed
          processes    one
        device
          device       cpu
          ...
        modules
          +---------+--------+------------+--------+-----------+---------+
          | Module  | Type   | Parameters | Share  | Trainable | Dtype   |
          +---------+--------+------------+--------+-----------+---------+
          | (model) | Linear |          8 | 100.0% | all       | float32 |
          +---------+--------+------------+--------+-----------+---------+
        tensors
          +--------+--------+---------+------+
          | Tensor | Shape  | Dtype   | Size |
          +--------+--------+---------+------+
          | bias   | (2,)   | float32 |    2 |
          | weight | (2, 3) | float32 |    6 |
          +--------+--------+---------+------+
    """
    check_positive_int("depth", depth)
    check_positive_int("rows", rows)

    def summary(state: TrainState, event: FitBegin, control: Control) -> None:
        if rank() == 0:
            _output(_panels(state, event, depth, rows), file)

    return summary


def _output(panels: Mapping[str, str], file: str | os.PathLike[str] | TextIO | None) -> None:
    page = "\n".join(f"{title}\n{textwrap.indent(text, '  ')}" for title, text in panels.items())
    if isinstance(file, str | os.PathLike):
        path = Path(file)
        make_folder(path.parent)
        replace_file(path, f"{page}\n".encode(errors="backslashreplace"))
    elif file is not None or not _print_in_boxes(panels):
        print(page, file=file, flush=True)


def _print_in_boxes(panels: Mapping[str, str]) -> bool:
    """Prints the panels in boxes if standard output is a wide enough terminal. Returns whether it did."""
    import rich
    from rich.panel import Panel
    from rich.text import Text

    console = rich.get_console()
    widest = max(len(line) for text in panels.values() for line in text.splitlines())
    if console.is_jupyter or console.is_dumb_terminal or not console.is_terminal or console.width < widest + 4:
        return False
    for title, text in panels.items():
        console.print(Panel(Text(text), title=title, title_align="left", border_style="dim", expand=False))
    return True


def _panels(state: TrainState, event: FitBegin, depth: int, rows: int) -> dict[str, str]:
    leaves = _leaves(state)
    modules, tied = _modules(state)
    facts = {
        "run": _run(state, event),
        "model": _model(state, leaves, tied),
        "data": _data(event),
        "training": _training(state),
        "distributed": _distributed(),
        "device": _device(state.step.device),
    }
    by_module = _module_rows(leaves, modules, depth, rows)
    tables = {
        "modules": _table(by_module),
        "tensors": _table(_tensor_rows(leaves, rows)) if len(leaves) <= rows or len(by_module) < 2 else "",
    }
    panels = {title: "\n".join(_line(label, text) for label, text in known.items()) for title, known in facts.items()}
    return {title: text for title, text in (panels | tables).items() if text}


def _line(label: str, text: str) -> str:
    return textwrap.fill(
        f"{printable(label):<11}  {printable(text)}",
        _LINE_WIDTH,
        subsequent_indent=" " * 13,
        break_long_words=False,
        break_on_hyphens=False,
    )


# Parameters


class _Leaf(NamedTuple):
    name: str  # dotted
    tensor: Tensor
    trainable: bool | None  # None if the state has no model


def _leaves(state: TrainState) -> list[_Leaf]:
    paths = [".".join(map(str, accessor.path)) for accessor in tree.accessors(state.params)]
    tensors: list[Tensor] = tree.leaves(state.params)
    masks = [None] * len(tensors) if state.model is None else tree.leaves(state.model.trainable)
    return [_Leaf(*each) for each in zip(paths, tensors, masks, strict=True)]


def _modules(state: TrainState) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the types of modules by dotted name, in model order, and the first name of tied parameters by each of
    their other names."""
    types: dict[str, str] = {}
    tied: dict[str, str] = {}

    def visit(model: Any) -> None:
        first: dict[Tensor, str] = {}  # tensors are hashed by identity
        paths = [accessor.path for accessor in tree.accessors(model)]
        for path, part in zip(paths, tree.leaves(model), strict=True):
            if isinstance(part, nn.Module):
                for name, module in part.named_modules():
                    types[_joined(path, name)] = type(module).__name__
                for name, value in part.named_parameters(remove_duplicate=False):
                    known = first.setdefault(value, _joined(path, name))
                    if known != _joined(path, name):
                        tied[_joined(path, name)] = known

    if state.model is not None:
        state.model.call(state.params, state.buffers, visit, train=False)
    return types, tied


def _joined(path: tuple[Any, ...], name: str) -> str:
    return ".".join([*map(str, path), *([name] if name else [])])


# Panels


def _run(state: TrainState, event: FitBegin) -> Rows:
    limits = [
        pluralize(total, unit)
        for total, unit in ((event.total_steps, "step"), (event.total_epochs, "epoch"))
        if total is not None
    ]
    fires = [kind.__name__ for kind in TRACED if kind in event.fires]
    return _nonempty(
        length=" or ".join(limits) + (", whichever comes first" if len(limits) > 1 else ""),
        begins=f"after step {event.step:,}" + (", resumed" if event.resumed else "") if event.step else "",
        seed=str(int(state.seed)),
        events=f"{', '.join(fires)} in the step" if fires else "",
    )


def _model(state: TrainState, leaves: list[_Leaf], tied: dict[str, str]) -> Rows:
    buffers = tree.leaves(state.buffers)
    counts: dict[str, int] = {}
    for leaf in leaves:
        counts[dtype_name(leaf.tensor.dtype)] = counts.get(dtype_name(leaf.tensor.dtype), 0) + leaf.tensor.numel()
    several = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    whole = f"{_numel(leaves):,} in {pluralize(len(leaves), 'tensor')}"
    trainable = _trainable(leaves)
    if trainable == "some":
        moving = _numel(leaf for leaf in leaves if leaf.trainable)
        whole += f": {moving:,} trainable, {_numel(leaves) - moving:,} frozen"
    elif trainable:
        whole += ", all trainable" if trainable == "all" else ", all frozen"
    parts = {name: tree.nbytes(getattr(state, name)) for name in ("params", "buffers", "opt_state", "slots")}
    named = [f"{name} {format_bytes(count)}" for name, count in parts.items() if count]
    everything = tree.nbytes(state)
    rest = everything - sum(parts.values())
    return _nonempty(
        parameters=whole,
        tied=", ".join(f"{other} is {name}" for other, name in tied.items()),
        buffers=f"{_total_numel(buffers):,} in {pluralize(len(buffers), 'tensor')}" if buffers else "",
        dtype=several if len(counts) > 1 else "".join(counts),
        state=f"{format_bytes(everything)}: {', '.join([*named, f'other {format_bytes(rest)}'])}",
    )


def _data(event: FitBegin) -> Rows:
    at = f" of epoch {int(event.epoch) + 1:,}" if event.epoch is not None else ""
    within = event.position - event.epoch_start
    within = within % event.epoch_length if event.epoch_length else within
    return _nonempty(
        epoch=pluralize(event.epoch_length, "batch", "batches") if event.epoch_length is not None else "",
        sizes=f"{event.num_shapes}, with one graph each if the step is compiled" if (event.num_shapes or 1) > 1 else "",
        position=f"after {pluralize(within, 'batch', 'batches')}{at}" if event.position else "",
    )


def _training(state: TrainState) -> Rows:
    kinds: dict[str, int] = {}
    accessors = tree.accessors(state.opt_state)
    for accessor, leaf in zip(accessors, tree.leaves(state.opt_state), strict=True):
        # The innermost node of a named type tells which transformation owns the leaf.
        named = [entry.type.__name__ for entry in accessor if entry.type not in (dict, list, tuple, PerParameter)]
        kind = named[-1] if named else "tensors"
        kinds[kind] = kinds.get(kind, 0) + leaf.nbytes
    slots = {name: tree.nbytes(memory) for name, memory in state.slots.items()}
    return _nonempty(
        optimizer=", ".join(f"{name} {format_bytes(count)}" for name, count in kinds.items()),
        callbacks=", ".join(f"{name} {format_bytes(count)}" for name, count in slots.items()),
    )


def _distributed() -> Rows:
    if dist.is_available() and dist.is_initialized():
        return {"processes": f"{dist.get_world_size():,}, this is rank {dist.get_rank()}; {dist.get_backend()}"}
    told = os.environ.get("WORLD_SIZE") or "1"
    if told != "1":
        return {"processes": f"{told}, this is rank {rank()}; torch.distributed is not initialized"}
    return {"processes": "one"}


def _device(device: torch.device) -> Rows:
    import psutil

    cuda = device.type == "cuda"
    taken = torch.cuda.mem_get_info(device) if cuda else None
    versions = f"{torch.__version__}" + (f", CUDA {torch.version.cuda}" if torch.version.cuda else "")
    return _nonempty(
        device=f"{device}, {device_name(device)}" if cuda else str(device),
        memory=f"{format_bytes(taken[1])}, {format_bytes(taken[0])} of it free" if taken else "",
        host=f"{format_bytes(psutil.virtual_memory().total)}, {pluralize(os.cpu_count() or 1, 'core')}",
        threads=f"{torch.get_num_threads():,}",
        torch=versions,
        python=platform.python_version(),
    )


def _nonempty(**facts: str) -> Rows:
    return {label: text for label, text in facts.items() if text}


# Tables


_Row = dict[str, str]
"""Cells by column."""


class _Group(NamedTuple):
    """Modules in the same row. They differ only in the indices of their names."""

    name: str
    depth: int
    kind: str
    leaves: list[_Leaf]
    number: int = 1  # number of modules


def _tensor_rows(leaves: list[_Leaf], rows: int) -> list[_Row]:
    shown, rest = _split_rows(leaves, rows)
    table = [
        {
            "tensor": truncate_middle(leaf.name, _MAX_NAME_LENGTH),
            "shape": str(tuple(leaf.tensor.shape)),
            "dtype": dtype_name(leaf.tensor.dtype),
            "size": f"{leaf.tensor.numel():,}",
        }
        for leaf in shown
    ]
    if rest:
        table.append({"tensor": f"(and {len(rest)} more)", "shape": "", "dtype": "", "size": f"{_numel(rest):,}"})
    return table


def _module_rows(leaves: list[_Leaf], modules: dict[str, str], depth: int, rows: int) -> list[_Row]:
    if not leaves:
        return []
    groups = _by_module(leaves, modules, depth)
    if len(groups) > rows:
        groups = _merge_similar(groups)
    while len(groups) > rows and depth > 1:
        depth -= 1
        groups = [group for group in groups if group.depth <= depth]
    if len(groups) == 1 and not modules:
        return []  # a flat dict of parameters, which the panels already summarize
    shown, rest = _split_rows(groups, rows)
    if rest:
        top = min(group.depth for group in rest)  # deeper groups are part of these
        beyond = [leaf for group in rest if group.depth == top for leaf in group.leaves]
        shown.append(_Group(f"(and {sum(group.number for group in rest)} more)", 1, "", beyond))
    return [_module_row(group, _numel(leaves)) for group in shown]


def _by_module(leaves: list[_Leaf], modules: dict[str, str], depth: int) -> list[_Group]:
    """Returns a group for each module with parameters down to ``depth``, in model order."""
    members: dict[str, list[_Leaf]] = {name: [] for name in ("", *modules)}
    for leaf in leaves:
        parts = leaf.name.split(".")
        for level in range(min(depth, len(parts) - 1) + 1):
            members.setdefault(".".join(parts[:level]), []).append(leaf)
    return [
        _Group(name, name.count(".") + 1 if name else 0, modules.get(name, ""), inside)
        for name, inside in members.items()
        if inside
    ]


def _merge_similar(groups: list[_Group]) -> list[_Group]:
    found: dict[Any, _Group] = {}
    for group in groups:
        starred = _NUMBER.sub("*", group.name)
        key = starred, group.kind, _numel(group.leaves), _dtypes(group.leaves), _trainable(group.leaves)
        first = found.get(key)
        if first is None:
            found[key] = group
        else:
            found[key] = _Group(starred, group.depth, group.kind, [*first.leaves, *group.leaves], first.number + 1)
    return list(found.values())


def _module_row(group: _Group, whole: int) -> _Row:
    count = _numel(group.leaves)
    last, kind = group.name.rpartition(".")[2] or "(model)", group.kind
    return {
        "module": "  " * group.depth + truncate_middle(last, _MAX_NAME_LENGTH),
        "type": truncate_middle(
            kind if group.number == 1 else f"{group.number} x {kind}" if kind else f"{group.number} similar",
            _MAX_NAME_LENGTH,
        ),
        "parameters": f"{count:,}",
        "share": f"{count / whole:.1%}" if whole else "",
        "trainable": _trainable(group.leaves),
        "dtype": _dtypes(group.leaves),
    }


def _table(rows: list[_Row]) -> str:
    if not rows:
        return ""
    try:
        from clu import parameter_overview  # imports jax, but initializes no backend
    except ImportError as error:
        return f"(no table, because clu cannot be imported: {error}; pip install clu)"
    rows = [{name: printable(cell) for name, cell in row.items()} for row in rows]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]  # without empty columns
    widest = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    aligned = [
        {name: row[name].rjust(widest[name]) if name in _RIGHT_ALIGNED else row[name] for name in columns}
        for row in rows
    ]
    kind = dataclasses.make_dataclass("Row", columns)
    return parameter_overview.make_table([kind(**row) for row in aligned], column_names=columns)


def _split_rows(found: list[Any], rows: int) -> tuple[list[Any], list[Any]]:
    """Splits items into those to show and those to sum up in the last row."""
    return (found, []) if len(found) <= rows else (found[: rows - 1], found[rows - 1 :])


def _trainable(leaves: list[_Leaf]) -> str:
    told = {leaf.trainable for leaf in leaves}
    if None in told or not told:
        return ""
    return "some" if len(told) > 1 else "all" if told == {True} else "frozen"


def _dtypes(leaves: list[_Leaf]) -> str:
    return ", ".join(sorted({dtype_name(leaf.tensor.dtype) for leaf in leaves}))


def _numel(leaves: Iterable[_Leaf]) -> int:
    return _total_numel(leaf.tensor for leaf in leaves)


def _total_numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
