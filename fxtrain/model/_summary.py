"""A summary of a state: its parts, modules and tensors, as text and as HTML."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from fxtrain import optim, tree
from fxtrain.core import (
    LOOP,
    Record,
    TrainState,
    check_positive_int,
    describe,
    dtype_name,
    first_names,
    format_bytes,
    printable,
)
from fxtrain.core._html import Number, facts, fold, html_view, table, view
from fxtrain.model._summary_tables import (
    RIGHT_ALIGNED,
    Row,
    leaves_of,
    model_facts,
    module_rows,
    modules_of,
    tensor_rows,
    text_table,
)
from fxtrain.optim import PerParameter

_LINE_WIDTH = 96  # characters per line outside tables
_LABEL_WIDTH, _MAX_LABEL_WIDTH = 11, 40  # characters


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Summary(Record):
    """A summary of a state, from ``summary``. Its repr is a page of text, and notebooks show tables.

    Args:
        model: Facts about the parameters by label, as text. Unknown ones are empty.
        memory: The bytes of each transformation of the optimizer and of each callback, as text.
        parts: One row for each part of the state, with its tensors, elements, bytes and dtypes.
        modules: One row for each module, with its type, parameters and dtype.
        tensors: One row for each parameter, with its shape and dtype; empty if there are many and the modules list
            them.

    Example:
        >>> import torch, fxtrain as fx
        >>> fx.summary(fx.init(torch.nn.Linear(3, 2))).modules[0]["parameters"]
        '8'
    """

    model: Mapping[str, str]
    memory: Mapping[str, str]
    parts: Sequence[Row]
    modules: Sequence[Row]
    tensors: Sequence[Row]

    def __repr__(self) -> str:
        texts = {
            "model": fact_lines(self._facts()),
            "state": text_table(self.parts),
            "modules": text_table(self.modules),
            "tensors": text_table(self.tensors),
        }
        return "\n".join(f"{title}\n{textwrap.indent(text, '  ')}" for title, text in texts.items() if text)

    @html_view
    def _repr_html_(self) -> str:
        modules = fold("modules", _html_table(self.modules), is_open=True) if self.modules else ""
        tensors = fold("tensors", _html_table(self.tensors), is_open=not self.modules) if self.tensors else ""
        return view(
            "Summary",
            facts(self._facts().items()),
            fold("state", _html_table(self.parts), is_open=True),
            modules,
            tensors,
        )

    def _facts(self) -> dict[str, str]:
        """Returns the known facts, except those in the table of parts."""
        known = {**self.model, **self.memory}
        return {label: text for label, text in known.items() if text and label != "state"}


def summary(state: TrainState, *, depth: int = 2, rows: int = 30) -> Summary:
    """Returns a summary of a state: parameters, bytes and dtypes of its parts, its modules and its tensors.

    Nothing is read from a device. ``fxtrain.observers.summary`` prints the same and more when a run begins. If there
    are more than ``rows`` modules, similar ones that differ only in their index are merged into one row. If that is not
    enough, the deepest modules are left out.

    Args:
        state: The state, from ``fxtrain.init``.
        depth: How many levels of modules to list below the model, at least 1.
        rows: Maximum number of rows in a table, at least 1.

    Raises:
        TypeError: ``state`` is not a state, or ``depth`` or ``rows`` is not an int.
        ValueError: ``depth`` or ``rows`` is smaller than 1.

    Example:
        >>> import torch, fxtrain as fx
        >>> fx.summary(fx.init(torch.nn.Linear(3, 2), fx.optim.adam(1e-3)))
        model
          parameters   8 in 2 tensors, all trainable
          dtype        float32
          opt_state    scale_by_adam 80 B
        state
          +-----------+---------+----------+-------+----------------+
          | Part      | Tensors | Elements | Bytes | Dtype          |
          +-----------+---------+----------+-------+----------------+
          | params    |       2 |        8 |  32 B | float32        |
          | opt_state |       5 |       18 |  80 B | float32, int64 |
          | other     |      10 |       10 |  38 B | bool, int64    |
          +-----------+---------+----------+-------+----------------+
        modules
          ...
    """
    if not isinstance(state, TrainState):
        raise TypeError(
            f"expected a TrainState to summarize, got {describe(state)}. Make one with fxtrain.init(module, tx)."
        )
    check_positive_int("depth", depth)
    check_positive_int("rows", rows)
    leaves = leaves_of(state)
    types, tied = modules_of(state)
    modules = module_rows(leaves, types, depth, rows)
    tensors = tensor_rows(leaves, rows) if len(leaves) <= rows or len(modules) < 2 else []
    return Summary(model_facts(state, leaves, tied), memory_facts(state), _part_rows(state), modules, tensors)


def memory_facts(state: TrainState) -> dict[str, str]:
    """Returns the bytes of each transformation of the optimizer and of each callback, as facts by label."""
    kinds: Counter[str] = Counter()
    accessors = tree.accessors(state.opt_state)
    for accessor, leaf in zip(accessors, tree.leaves(state.opt_state), strict=True):
        # The innermost node of a named type tells which transformation owns the leaf.
        named = [entry.type for entry in accessor if entry.type not in (dict, list, tuple, PerParameter)]
        kinds[_transformation(named[-1]) if named else "tensors"] += leaf.nbytes
    return {
        "opt_state": ", ".join(f"{name} {format_bytes(count)}" for name, count in kinds.items()),
        "callbacks": ", ".join(
            f"{name} {format_bytes(tree.nbytes(slot))}"
            for name, slot in state.slots.items()
            if not name.startswith(LOOP)
        ),
    }


def fact_lines(known: Mapping[str, str]) -> str:
    """Returns facts by label as aligned lines, without empty ones."""
    shown = {printable(label): printable(" ".join(text.split())) for label, text in known.items() if text}
    width = max(min(max(map(len, ["", *shown])), _MAX_LABEL_WIDTH), _LABEL_WIDTH)
    return "\n".join(_line(label, text, width) for label, text in shown.items())


def _line(label: str, text: str, width: int) -> str:
    return textwrap.fill(
        f"{label:<{width}}  {text}",
        _LINE_WIDTH,
        subsequent_indent=" " * (width + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _transformation(state_type: type[object]) -> str:
    """Returns the function whose state has a type, as in ``ScaleByAdamState``, or the name of the type."""
    functions = {name.replace("_", ""): name for name in optim.__all__}
    return functions.get(state_type.__name__.removesuffix("State").lower(), state_type.__name__)


def _part_rows(state: TrainState) -> list[Row]:
    parts: dict[str, list[Tensor]] = {
        name: tree.leaves(getattr(state, name)) for name in ("params", "buffers", "opt_state", "slots")
    }
    parts["other"] = tree.leaves([state.step, state.seed, state.position, state.due])
    return [
        {
            "part": name,
            "tensors": f"{len(leaves):,}",
            "elements": f"{sum(leaf.numel() for leaf in leaves):,}",
            "bytes": format_bytes(sum(leaf.nbytes for leaf in leaves)),
            "dtype": first_names(sorted({dtype_name(leaf.dtype) for leaf in leaves})),
        }
        for name, leaves in parts.items()
        if leaves
    ]


def _html_table(rows: Sequence[Row]) -> str:
    names = [name for name in rows[0] if any(row[name] for row in rows)]  # without empty columns
    cells = [
        [Number(row[name]) if name in RIGHT_ALIGNED else row[name].replace("  ", "\u2003") for name in names]
        for row in rows
    ]
    return table(names, cells)
