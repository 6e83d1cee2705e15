# pyright: reportUnusedImport=false
"""Pytree functions: optree in fxtrain's namespace, with paths written as code.

Dictionaries, lists, tuples and named tuples are nodes, as are ``TrainState``, ``Control`` and metrics. ``None`` is an
empty node. Dictionaries are flattened in the order of their sorted keys.
"""

from fxtrain.tree._arithmetic import clone, device_of, global_norm, nbytes, where, zeros_like
from fxtrain.tree._generated_code import Flatten, OtherStructureError, generate_flatten, generate_unflatten
from fxtrain.tree._map import accessors, flatten, leaves, map, map_with_path, paths, structure, unflatten  # noqa: A004
from fxtrain.tree._nodes import MaskedNode, Path, as_code, as_name, children, leaf_paths, rebuilt

__all__ = [
    "clone",
    "flatten",
    "global_norm",
    "leaves",
    "map",
    "map_with_path",
    "paths",
    "structure",
    "unflatten",
    "where",
    "zeros_like",
]
