"""Explains why a compiled step recompiles, and how to avoid it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, TrainState, dtype_name, first_names

_MAX_SHOWN_CONDITIONS = 3


def described(state: TrainState, batch: Batch) -> dict[str, str]:
    """Returns the dtype, shape, strides and device that a graph assumes of each leaf, by path."""
    return {
        path: _kind(leaf)
        for name, part in (("state", state), ("batch", batch))
        for path, leaf in zip(tree.paths(part, name), tree.leaves(part), strict=True)
    }


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
    if any(path.startswith("batch") for path in paths):
        return (
            'For a smaller last batch, set drop_last=True or drop_last="pad" in the data source. For many sizes, pad '
            "to few with fxtrain.data.bucketed, which declares its sizes and compiles without this warning. Or compile "
            "one slower graph for all sizes with fxtrain.compile(step, dynamic=True), which suits batches of graphs "
            "too."
        )
    return "A step keeps the shapes and dtypes of its state. Find what changed the state between two steps."


def is_other_batch(new: Mapping[str, str], known: Sequence[Mapping[str, str]]) -> bool:
    """Whether the state is that of an existing graph, so that only the batch differs."""
    state = _part(new, "state")
    return any(_part(each, "state") == state for each in known)


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
