"""The step's view of a batch: tensors, with a placeholder for each value that is not a tensor.

Callbacks and observers read the whole batch in ``event.batch``. A step must return the same result compiled and
uncompiled, and must not recompile when a text changes, so it receives placeholders in both modes.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, Tree, register_node
from fxtrain.data._as_tensors import as_tensors


class Placeholder:
    """A placeholder, in the batch that a step receives, for a value that is not a tensor.

    Indexing returns another placeholder. Any other use raises TypeError.

    Args:
        path: The value's path in the batch, as code.
    """

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def _refuse(self, *_: object) -> NoReturn:
        raise TypeError(
            f"expected a step that reads tensors, got one that reads {self._path}, which does not enter the step "
            "because it is not a tensor. Convert it to a tensor before the step, with data.map or the collate "
            "function. Callbacks can read it in event.batch."
        )

    __getattr__ = __len__ = __iter__ = __contains__ = __call__ = _refuse
    __bool__ = __int__ = __float__ = __index__ = __str__ = __format__ = __fspath__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __mod__ = _refuse

    @classmethod
    def __torch_function__(cls, function: object, types: object, args: Tree = (), kwargs: Tree = None) -> NoReturn:
        todo = [*args, *(kwargs or {}).values()]
        while not isinstance(given := todo.pop(0), cls):
            todo += given if isinstance(given, list | tuple) else ()
        given._refuse()

    def __getitem__(self, key: object) -> Placeholder:
        return Placeholder(f"{self._path}[{key!r}]")

    def __repr__(self) -> str:
        return f"<{self._path}: not a tensor>"


def for_step(batch: Batch) -> Tree:
    """Returns the batch as a step receives it, in new containers.

    Numbers and arrays become tensors. Each part that contains values but no tensor becomes a ``Placeholder``.

    Example:
        >>> for_step({"x": torch.ones(2), "scale": 0.5, "text": ["a", "b"]})
        {'x': tensor([1., 1.]), 'scale': tensor(0.5000), 'text': <batch['text']: not a tensor>}
    """
    if torch.compiler.is_dynamo_compiling():
        return batch
    batch = as_tensors(batch)
    if all(isinstance(leaf, Tensor) for leaf in tree.leaves(batch, none_is_leaf=True)):
        return tree.map(_resolved, batch)

    def enter(path: str, part: object) -> Tensor | Placeholder:
        return _resolved(part) if isinstance(part, Tensor) else Placeholder(path)

    return tree.map_with_path(enter, batch, root="batch", is_leaf=_has_no_tensor)


def _resolved(leaf: Tensor) -> Tensor:
    """Returns a tensor without lazy conjugation or negation, which compiled code would not see."""
    return leaf.resolve_conj().resolve_neg() if leaf.is_conj() or leaf.is_neg() else leaf


def _has_no_tensor(part: object) -> bool:
    """Whether a part of a batch contains values but no tensor."""
    if isinstance(part, Tensor):
        return False
    # None counts as a value in a list, because a text column may be None in every row of a batch.
    is_column = type(part) in (list, tuple)
    leaves = tree.leaves(part, none_is_leaf=is_column)
    return bool(leaves) and not any(isinstance(leaf, Tensor) for leaf in leaves)


class _PlaceholderPath:
    """A placeholder's path, as part of the tree structure. All paths compare equal, so elements of a list match."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _PlaceholderPath)

    def __hash__(self) -> int:
        return hash(_PlaceholderPath)

    def __repr__(self) -> str:
        return self.path


register_node(Placeholder, lambda node: ((), _PlaceholderPath(node._path)), lambda place, _: Placeholder(place.path))
