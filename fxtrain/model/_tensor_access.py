"""Watches which tensors a function that runs a model reads and writes.

A frozen parameter that a forward pass writes, such as those of the momentum encoders of MoCo, BYOL and DINO, is state
like a buffer. An argument that the function writes is cloned for it. Both are detected at the first write: the call is
abandoned before the write happens, and repeated with clones. All other writes raise before they happen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxtrain import tree
from fxtrain._torch_internals.dispatch import HigherOrderOperator, unwrapped
from fxtrain._torch_internals.dynamo import inlined_only
from fxtrain._torch_internals.memory import storage_id, write_count
from fxtrain.core import Tree


class WriteError(RuntimeError):
    """A function tried to write into a tensor that it must not change."""


class CloneNeeded(BaseException):
    """Signals that a call is about to write tensors that must be cloned first.

    It is a ``BaseException``, so that ``except Exception`` in the user's code does not catch it.

    Args:
        frozen: True for frozen parameters, False for arguments of the function.
    """

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen


TensorLister = Callable[[], Iterable[tuple[str, Tensor]]]
"""Returns tensors with their names. Called at the first in-place write only, because most calls write nothing."""


class WriteGuard:
    """Allows, records or refuses each in-place write before it happens, during one call of a function.

    Args:
        who: The function, for errors.
        trained: Trainable parameters.
        frozen: Frozen parameters that are not cloned.
        clones: Clones of frozen parameters, by name.
        buffers: Clones of buffers.
        arguments: Arguments of the function that are not cloned.
        captured: Tensors outside the state.

    Attributes:
        written: Names of the clones that were written.
    """

    def __init__(
        self,
        who: str,
        *,
        trained: TensorLister,
        frozen: Callable[[], Iterable[Tensor]],
        clones: Mapping[str, Tensor],
        buffers: Iterable[Tensor],
        arguments: Iterable[object],
        captured: TensorLister,
    ) -> None:
        self._who, self._trained, self._frozen, self._clones = who, trained, frozen, clones
        self._buffers, self._arguments, self._captured = buffers, arguments, captured
        self._actions: dict[int, Callable[[str], None]] | None = None
        self._storages = {name: memory_of(value) for name, value in clones.items()}
        self.written: set[str] = set()

    def __call__(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Checks a torch function that is about to run.

        Args:
            name: Name of the torch function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            WriteError: If it would write into a trained parameter or a captured tensor.
            CloneNeeded: If it would write into a frozen parameter or an argument that is not cloned.
        """
        for target in written_by(name, args, kwargs):
            self.refuse(name, target)

    def refuse(self, name: str, target: Tensor) -> None:
        """Raises as ``__call__`` does if the torch function ``name`` must not write ``target``."""
        decide = self._actions_by_storage().get(memory_of(target))
        if decide is not None:
            decide(name)

    def watches(self, tensor: Tensor) -> bool:
        """Returns whether writes into the tensor's storage are refused or recorded."""
        return memory_of(tensor) in self._actions_by_storage()

    def owns(self, tensor: Tensor) -> bool:
        """Returns whether the tensor is a clone that the function may write."""
        memory = memory_of(tensor)
        return any(memory_of(value) == memory for value in (*self._clones.values(), *self._buffers))

    def in_own_storage(self, name: str, value: Tensor) -> Tensor:
        """Returns a clone's value after the call, in separate storage: ``p.data = q.data`` makes two share one."""
        return value if memory_of(value) == self._storages.get(name) else value.clone()

    def _actions_by_storage(self) -> Mapping[int, Callable[[str], None]]:
        # No action references the guard: in a cycle, the tensors of each call would stay until a garbage collection.
        if self._actions is None:
            table: dict[int, Callable[[str], None]] = {}
            for name, value in self._captured():
                table[memory_of(value)] = functools.partial(_refuse_captured, self._who, name)
            for value in self._arguments:
                if isinstance(value, Tensor):
                    table[memory_of(value)] = functools.partial(_raise_noticed, False)
            for value in self._frozen():
                table[memory_of(value)] = functools.partial(_raise_noticed, True)
            for name, value in self._trained():
                table[memory_of(value)] = functools.partial(_refuse_trained, self._who, name)
            for name, memory in self._storages.items():
                table[memory] = functools.partial(_record, self.written, name)
            self._actions = table
        return self._actions


def _refuse_trained(who: str, name: str, write: str) -> None:
    raise WriteError(
        f"expected {who} to leave trained parameters to the optimizer, got {_described(write)} {name}. Call "
        "requires_grad_(False) before fxtrain.init on parameters that the forward pass updates, such as those of a "
        "momentum encoder. Apply constraints on trained parameters after the step, with state.replace(params=...)."
    )


def _refuse_captured(who: str, name: str, write: str) -> None:
    raise WriteError(
        f"expected {who} to write into nothing outside the state, got {_described(write)} {name}. Register it as a "
        "buffer of the model, return the value as a metric, or keep it in a slot of a callback. If it belongs to "
        "another module, give that to fxtrain.init together with the model."
    )


def _record(written: set[str], name: str, _: str) -> None:
    written.add(name)


def _raise_noticed(frozen: bool, _: str) -> None:
    raise CloneNeeded(frozen=frozen)


def _described(write: str) -> str:
    return "an assignment to .data of" if write == "data" else f"an in-place write ({write}) to"


def copies(values: Tree) -> Tree:
    """Returns a pytree with its tensors cloned."""
    return tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, values)


def written_by(name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Iterable[Tensor]:
    """Returns the tensors that a torch function writes in place.

    Args:
        name: Name of the torch function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> len(written_by("mul_", (x, 2), {})), len(written_by("mul", (x, 2), {}))
        (1, 0)
    """
    # Without the name of an overload.
    name = name.partition(".")[0]
    found: Tree = ()
    if name.endswith("__"):
        found = args[:1] if name in _IN_PLACE_OPERATORS else ()
    elif name.endswith("_"):
        found = () if name in _NO_WRITES else (args[:1], kwargs.get("tensor"))
    elif name in _NORMS_WITH_STATISTICS:
        if kwargs.get(_NORMS_WITH_STATISTICS[name], False):
            found = (*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var"))
    elif name in _EMBEDDINGS:
        if kwargs.get("max_norm") is not None:
            found = (kwargs.get("weight", args[1:2]),)
    elif kwargs.get("out") is not None:
        found = (kwargs["out"],)
    elif kwargs.get("inplace"):
        found = (kwargs.get("input", args[:1]),)
    return [leaf for leaf in tree.leaves(found) if isinstance(leaf, Tensor)] if found else ()


_IN_PLACE_OPERATORS = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "iadd", "isub", "imul", "itruediv", "idiv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)
_NO_WRITES = frozenset(("requires_grad_", "retain_grad_", "share_memory_", "rename_", "detach_"))
_NORMS_WITH_STATISTICS = {"batch_norm": "training", "instance_norm": "use_input_stats"}
_EMBEDDINGS = frozenset(("embedding", "embedding_bag"))


def memory_of(tensor: Tensor) -> int:
    """Returns the identity of a tensor's storage, which its views share, also inside transforms of torch.func."""
    tensor = unwrapped(tensor)
    try:
        return storage_id(tensor)
    except (NotImplementedError, RuntimeError):  # Sparse tensors have no storage.
        return id(tensor)


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
        # torch compiles torch.cond and FlexAttention by Dynamo, which does not know the names of these operators.
        if torch.compiler.is_dynamo_compiling() and isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        if not _reads_shape_only(func):
            self.found.update(id(leaf) for leaf in tree.leaves((args, kwargs)) if id(leaf) in self._watched)
        self.written.update(id(target) for target in written_by(func.__name__, args, kwargs))
        return func(*args, **kwargs)


_ATTRIBUTES_WITH_VALUES = frozenset(("data", "grad", "T", "mT", "H", "mH", "real", "imag"))
_SHAPE_FUNCTIONS = frozenset(
    (
        *("size", "dim", "stride", "numel", "nelement", "element_size", "storage_offset", "get_device", "__len__"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_same_size", "is_inference", "__hash__"),
        *("type", "type_as", "new_empty", "empty_like", "zeros_like", "ones_like", "new_zeros", "new_ones"),
        *("ndimension", "__set__", "__delete__"),
    )
)


def _reads_shape_only(func: Callable[..., object]) -> bool:
    name = func.__name__
    if name == "__get__":
        return func.__self__.__name__ not in _ATTRIBUTES_WITH_VALUES
    return name in _SHAPE_FUNCTIONS


def versions(values: Tree) -> list[int]:
    """Returns torch's count of in-place writes to each leaf, or an empty list while Dynamo compiles.

    Tensors made in inference mode have no such count, and get 0.
    """
    if torch.compiler.is_dynamo_compiling():
        return []
    return [0 if leaf.is_inference() else write_count(leaf) for leaf in tree.leaves(values)]


def refuse_in_place_writes(who: str, values: Tree, before: list[int], root: str) -> None:
    """Raises if a leaf was written in place since ``before`` was taken.

    Args:
        who: The function, for errors.
        values: A pytree of tensors.
        before: ``versions(values)`` from before the call.
        root: Name of the pytree, for errors.

    Raises:
        RuntimeError: Names the leaf. The write has happened and is not undone.
    """
    if before == versions(values):
        return
    changed = zip(tree.paths(values, root), before, versions(values), strict=True)
    path = next(path for path, was, now in changed if was != now)
    raise RuntimeError(
        f"expected {who} to leave its state unchanged, got an in-place write to {path}. Compute a new value, and pass "
        "it to state.replace. Register a tensor that a module writes at each call as a buffer."
    )
