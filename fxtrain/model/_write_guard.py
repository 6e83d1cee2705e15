"""Handles in-place writes by a function that runs a model: to parameters, to arguments, and to captured tensors.

A frozen parameter that a forward pass writes, such as those of the momentum encoders of MoCo, BYOL and DINO, is state
like a buffer. An argument that the function writes is cloned for it. Both are detected at the first write: the call is
abandoned before the write happens, and repeated with clones. All other writes raise before they happen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.dispatch import unwrapped
from fxtrain._torch_internals.memory import storage_id
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
        if self._actions is None:
            table: dict[int, Callable[[str], None]] = {}
            for name, value in self._captured():
                table[memory_of(value)] = functools.partial(self._refuse_captured, name)
            for value in self._arguments:
                if isinstance(value, Tensor):
                    table[memory_of(value)] = functools.partial(_raise_noticed, False)
            for value in self._frozen():
                table[memory_of(value)] = functools.partial(_raise_noticed, True)
            for name, value in self._trained():
                table[memory_of(value)] = functools.partial(self._refuse_trained, name)
            for name, memory in self._storages.items():
                table[memory] = lambda _, name=name: self.written.add(name)
            self._actions = table
        return self._actions

    def _refuse_trained(self, name: str, write: str) -> None:
        raise WriteError(
            f"expected {self._who} to leave trained parameters to the optimizer, got {_described(write)} {name}. Call "
            "requires_grad_(False) before fxtrain.init on parameters that the forward pass updates, such as those of a "
            "momentum encoder. Apply constraints on trained parameters after the step, with state.replace(params=...)."
        )

    def _refuse_captured(self, name: str, write: str) -> None:
        raise WriteError(
            f"expected {self._who} to write into nothing outside the state, got {_described(write)} {name}. Register "
            "it as a buffer of the model, return the value as a metric, or keep it in a slot of a callback. If it "
            "belongs to another module, give that to fxtrain.init together with the model."
        )


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
    if name.endswith("__"):
        return [leaf for leaf in args[:1] if isinstance(leaf, Tensor)] if name in _IN_PLACE_OPERATORS else ()
    if name.endswith("_"):
        if name in _NO_WRITES:
            return ()
        return [leaf for leaf in tree.leaves((args[:1], kwargs.get("tensor"))) if isinstance(leaf, Tensor)]
    if name in _NORMS_WITH_STATISTICS:
        at, training = _NORMS_WITH_STATISTICS[name]
        if kwargs.get(training, False):
            given = [*args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")]
            return [leaf for leaf in given if isinstance(leaf, Tensor)][:at]
        return ()
    if name in _EMBEDDINGS:
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        return (weight,) if kwargs.get("max_norm") is not None and isinstance(weight, Tensor) else ()
    if not kwargs:
        return ()
    written = [kwargs["out"]] if kwargs.get("out") is not None else []
    if kwargs.get("inplace"):
        written.append(kwargs.get("input", args[0] if args else None))
    return [leaf for leaf in tree.leaves(written) if isinstance(leaf, Tensor)] if written else ()


_IN_PLACE_OPERATORS = frozenset(
    f"__{name}__"
    for name in (
        *("setitem", "iadd", "isub", "imul", "itruediv", "idiv", "ifloordiv", "imod", "ipow"),
        *("iand", "ior", "ixor", "ilshift", "irshift"),
    )
)
_NO_WRITES = frozenset(("requires_grad_", "retain_grad_", "share_memory_", "rename_", "detach_"))
_NORMS_WITH_STATISTICS = {"batch_norm": (2, "training"), "instance_norm": (2, "use_input_stats")}
_EMBEDDINGS = frozenset(("embedding", "embedding_bag"))


def memory_of(tensor: Tensor) -> int:
    """Returns the identity of a tensor's storage, which its views share, also inside transforms of torch.func."""
    tensor = unwrapped(tensor)
    try:
        return storage_id(tensor)
    except (NotImplementedError, RuntimeError):  # Sparse tensors have no storage.
        return id(tensor)
