"""Records which tensors a function reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

from fxtrain import tree
from fxtrain._torch_internals.dynamo import inlined_only
from fxtrain.model._write_guard import written_by


@inlined_only
class TensorReads(TorchFunctionMode):
    """Records which of the watched tensors operations read, and which tensors they write in place."""

    def __init__(self, watched: Collection[int]) -> None:
        super().__init__()
        self._watched = watched
        self.found: set[int] = set()
        self.written: set[int] = set()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Collection[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not _reads_shape_only(func):
            self.found.update(id(leaf) for leaf in tree.leaves((args, kwargs)) if id(leaf) in self._watched)
        self.written.update(id(target) for target in written_by(func.__name__, args, kwargs))
        return func(*args, **kwargs)


_ATTRIBUTES_WITH_VALUES = frozenset(("data", "grad", "T", "mT", "H", "mH", "real", "imag"))
_SHAPE_FUNCTIONS = frozenset(
    (
        *("size", "dim", "stride", "numel", "nelement", "element_size", "storage_offset", "get_device", "__len__"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_same_size", "is_inference", "__hash__"),
        *(
            "type",
            "type_as",
            "new_empty",
            "empty_like",
            "zeros_like",
            "ones_like",
            "new_zeros",
            "new_ones",
            "ndimension",
        ),
        *("__set__", "__delete__"),
    )
)


def _reads_shape_only(func: Callable[..., object]) -> bool:
    name = func.__name__
    if name == "__get__":
        return func.__self__.__name__ not in _ATTRIBUTES_WITH_VALUES
    return name in _SHAPE_FUNCTIONS
