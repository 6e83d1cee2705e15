"""Warns about recompilations or refuses them, and explains how to avoid them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, TrainState, Tree, dtype_name, first_names, warn
from fxtrain.step import EvalFunction, Step

_log = logging.getLogger(__name__)

_MAX_SHOWN_CONDITIONS = 3
_KEYS = ".keys()"


OnRecompile = Literal["warn", "error", "allow"]


class RecompileError(RuntimeError):
    """A compiled step would have to recompile, which ``on_recompile="error"`` forbids."""


class Recompiles:
    """The inputs for which a step has graphs, and what happens if others need one.

    Args:
        step: The step, for messages.
        on_recompile: As in ``compile``.
    """

    def __init__(self, step: Step | EvalFunction, on_recompile: OnRecompile) -> None:
        self.known: list[dict[str, str]] = []
        """The kinds of the leaves of each graph, from ``described``."""
        self._step = step
        self._on_recompile: OnRecompile = on_recompile
        self._declared = 1  # the number of batch shapes up to which a new graph raises no warning
        self._has_warned_of_batches = False

    def fresh(self, step: Step | EvalFunction, on_recompile: OnRecompile | None = None) -> Recompiles:
        """Returns a copy for ``step`` that knows no graphs, with another ``on_recompile`` if one is given."""
        made = Recompiles(step, self._on_recompile if on_recompile is None else on_recompile)
        made._declared, made._has_warned_of_batches = self._declared, self._has_warned_of_batches
        return made

    def expect_shapes(self, count: int | None) -> None:
        """Declares that ``count`` more batch shapes follow. 1 and None (unknown) declare nothing."""
        self._declared = batches_of(self.known) + count if count is not None and count > 1 else 1
        if self._declared > 1:
            _log.info("%r takes batches of %d shapes and compiles a graph for each.", self._step, count)

    def check(self, kinds: dict[str, str], broken: Sequence[str] | None) -> None:
        """Applies ``on_recompile`` to another graph, unless a data source has declared it.

        Args:
            kinds: The leaves for which a graph is needed, from ``described``.
            broken: The conditions of a graph of symbolic sizes that are not met, as code.
        """
        # Whether a graph exists for this state, so that only the batch differs.
        is_batch = _part(kinds, "state") in [_part(known, "state") for known in self.known]
        is_declared = is_batch and batches_of([*self.known, kinds]) <= self._declared
        # Sizes 0 and 1 are never symbolic, so one more graph for them is expected.
        is_declared |= broken is not None and not broken
        if self._on_recompile == "allow" or is_declared:
            return
        remedy, found = advice(kinds, self.known, broken), changes(kinds, self.known)
        if self._on_recompile == "error":
            raise RecompileError(
                f"expected inputs for which {self._step!r} is compiled, got others: {found}. {remedy} "
                "on_recompile='allow' compiles another graph."
            )
        # One warning is enough for batches of many sizes.
        if not (is_batch and self._has_warned_of_batches):
            warn(
                f"{self._step!r} recompiles: {found}. {remedy} on_recompile='allow' silences this warning.",
                UserWarning,
            )
        self._has_warned_of_batches |= is_batch


def described(state: TrainState, batch: Batch) -> dict[str, str]:
    """Returns the dtype, shape, strides and device that a graph assumes of each leaf, by path."""
    return {
        path: _kind(leaf)
        for name, part in (("state", state), ("batch", batch))
        for path, leaf in zip(tree.paths(part, name), tree.leaves(part), strict=True)
    }


def described_in_order(state: TrainState, batch: Batch) -> dict[str, str]:
    """As ``described``, with the order of the keys in the batch, which a step that iterates over them sees."""
    return described(state, batch) | dict(_orders(batch, "batch"))


def _orders(node: Tree, path: str) -> Iterator[tuple[str, str]]:
    """Yields the keys of each dict in a batch, by path."""
    if isinstance(node, dict):
        yield f"{path}{_KEYS}", ", ".join(map(repr, node))
        for key, child in node.items():
            yield from _orders(child, f"{path}[{key!r}]")
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from _orders(child, f"{path}[{index}]")


def changes(new: Mapping[str, str], known: Sequence[Mapping[str, str]]) -> str:
    """Describes how ``new`` differs from the most similar entry of ``known``."""
    old = min(known, key=lambda each: sum(each.get(path) != kind for path, kind in new.items()))
    differences = [
        f"{path} is new" if path not in old else f"{path}: {old[path]} -> {new[path]}"
        for path in new
        if old.get(path) != new[path]
    ]
    differences += [f"{path} is missing" for path in old if path not in new]
    return first_names(differences) if differences else "the types of containers, or the model"


def advice(new: Mapping[str, str], known: Sequence[Mapping[str, str]], broken: Sequence[str] | None = None) -> str:
    """Suggests how to avoid the recompilation.

    Args:
        new: The leaves for which a graph is needed, from ``described``.
        known: The leaves of each existing graph.
        broken: The conditions of a graph of symbolic sizes that are not met, as code.
    """
    if broken:
        shown = ", ".join(broken[:_MAX_SHOWN_CONDITIONS])
        return (
            f"The graph made with dynamic=True requires {shown}, because the step reads these sizes as numbers. Write "
            "x.shape[0] in place of len(x). For operators that need numbers, such as recurrent layers, pad to few "
            "sizes with fxtrain.data.bucketed, which compiles a graph for each without this warning."
        )
    paths = {path for each in known for path in {*new, *each} if new.get(path) != each.get(path)}
    if any(path.startswith("state.slots") for path in paths):
        return "A new traced callback recompiles the step once. A new callback of the loop does not."
    if paths and all(path.endswith(_KEYS) for path in paths):
        return "The step may iterate over the keys, so each order has a graph. Give all batches one order."
    if any(path.startswith("batch") for path in paths):
        return (
            'For a smaller last batch, set drop_last=True or drop_last="pad" in the data source. For many sizes, pad '
            "to few with fxtrain.data.bucketed, which declares its sizes and compiles without this warning. Or compile "
            "one slower graph for all sizes with fxtrain.compile(step, dynamic=True), which suits batches of graphs "
            "too."
        )
    return "A step keeps the shapes and dtypes of its state. Find what changed the state between two steps."


def batches_of(known: Sequence[Mapping[str, str]]) -> int:
    """Returns the number of different kinds of batches in ``known``."""
    return len({tuple(_part(each, "batch").items()) for each in known})


def _part(kinds: Mapping[str, str], name: str) -> dict[str, str]:
    return {path: kind for path, kind in kinds.items() if path.startswith(name)}


def _kind(leaf: object) -> str:
    if not isinstance(leaf, Tensor):
        return type(leaf).__name__
    dense = "" if leaf.is_contiguous() else f" with strides {leaf.stride()}"
    return f"{dtype_name(leaf.dtype)}{list(leaf.shape)}{dense} on {leaf.device}"
