"""The function ``remat``, which marks parts of a model whose activations are recomputed."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fxtrain import tree
from fxtrain._torch_internals.dispatch import TorchDispatchMode, without_dispatch_modes
from fxtrain._torch_internals.modules import own_buffers, own_modules, own_parameters
from fxtrain.core import describe
from fxtrain.model._recomputed_regions import keeping

F = TypeVar("F", bound=Callable[..., Any])

Saved = Literal["nothing", "matmuls", "everything"]
_SAVED = ("nothing", "matmuls", "everything")

_MATMULS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product", "linear")
"""The beginnings of the names of operators that multiply matrices. Views have no name of their own."""


def remat(function: F, save: Saved | Callable[[Any], bool] = "nothing") -> F:
    """Returns a function or module whose activations are recomputed in the backward pass, to save memory.

    It computes the same values and gradients, random samples included, and buffers are written once. Its inputs are
    kept, and so are outputs that later computations need.

    Steps compiled by ``fxtrain.compile`` recompute in their graph. Uncompiled steps recompute by ``torch.autograd``.
    Nothing is recomputed if an uncompiled step runs inside ``torch.func.vmap`` or an outer derivative, or with a
    ``backend`` of ``torch.compile``. Regions nest: an inner region is recomputed once more. Inside a module,
    ``torch.utils.checkpoint.checkpoint(function, ...)`` does the same as ``remat(function)(...)``.

    Args:
        function: A function of tensors, or a module. The module itself is not modified: the result is of a subclass
            and shares its parameters, under the same names.
        save: What is kept all the same: ``"nothing"``, ``"matmuls"`` (results of matrix products, convolutions and
            attention), ``"everything"``, or a function of an operator, such as ``torch.ops.aten.mm.default``, that
            returns whether its results are kept.

    Raises:
        TypeError: ``function`` cannot be called.
        ValueError: ``save`` is none of these.

    Example:
        >>> import torch, fxtrain as fx
        >>> block = fx.remat(torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.GELU(), torch.nn.Linear(8, 1)))
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        >>> state, output = step(fx.init(block, tx), torch.ones(4, 2))
        >>> int(state.step)
        1
    """
    if not callable(function):
        raise TypeError(f"expected a function or a module, got {describe(function)}. Pass what computes activations.")
    if not callable(save) and save not in _SAVED:
        raise ValueError(
            f"expected save to be one of {', '.join(map(repr, _SAVED))}, or a function of an operator, got "
            f"{describe(save)}."
        )
    if isinstance(function, nn.Module):
        return _copy_of(function, save)

    @functools.wraps(function)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        return _call(function, save, args, kwargs)

    return recomputed  # pyright: ignore[reportReturnType]


def _call(function: Callable[..., Any], save: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    # Dynamo cannot trace checkpoints inside torch.func.
    if save == "everything" or torch.compiler.is_dynamo_compiling():
        return function(*args, **kwargs)
    from torch.utils.checkpoint import checkpoint, noop_context_fn

    chosen = _saves(save)
    context_fn = noop_context_fn if chosen is None else functools.partial(_contexts, chosen)
    with keeping(None if chosen is None else lambda node: chosen(node.target)):
        # Keyword arguments are bound, because those of ``checkpoint`` have names too.
        return checkpoint(functools.partial(function, **kwargs), *args, use_reentrant=False, context_fn=context_fn)


def _saves(save: Any) -> Callable[[Any], bool] | None:
    if save == "nothing":
        return None
    return _is_matmul if save == "matmuls" else save


def _is_matmul(operator: Any) -> bool:
    name = getattr(operator, "name", lambda: "")().partition("::")[2]
    return "backward" not in name and name.startswith(_MATMULS)


def _contexts(saves: Callable[[Any], bool]) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if saves(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    first, again = create_selective_checkpoint_contexts(policy)
    return _FirstPass(policy, first, saves), again


class _FirstPass:
    """The context of a first pass, whose operations get copies of the results that are kept.

    Some write into them in place, as ``GRUCell`` does, and torch does not notice each such write.
    """

    def __init__(self, policy: Callable[..., Any], keeping: Any, saves: Callable[[Any], bool]) -> None:
        self.policy_fn = policy  # read where the pass is traced instead
        self._modes = (keeping, _CopyResults(saves))
        self._entered = contextlib.ExitStack()

    def __enter__(self) -> None:
        for mode in self._modes:
            self._entered.enter_context(mode)

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)


class _CopyResults(TorchDispatchMode):
    def __init__(self, saves: Callable[[Any], bool]) -> None:
        super().__init__()
        self._saves = saves

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._saves(func):
            return result
        with without_dispatch_modes():
            return tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)


def _copy_of(module: nn.Module, save: Any) -> Any:
    """Returns a copy of a module that shares its tensors and submodules and recomputes its ``forward``."""
    copied = copy.copy(module)
    copied.__dict__ = dict(module.__dict__)
    for name, entries in (("_parameters", own_parameters), ("_buffers", own_buffers), ("_modules", own_modules)):
        copied.__dict__[name] = entries(module).copy()
    copied.__class__ = _class_of(type(module), save)
    return copied


@functools.cache
def _class_of(kind: type[nn.Module], save: Any) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _call(functools.partial(kind.forward, self), save, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _restored, (kind, save), self.__dict__

    functools.update_wrapper(forward, kind.forward)
    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)


def _restored(kind: type[nn.Module], save: Any) -> nn.Module:
    """Creates the module that a copy or a pickle fills."""
    made = _class_of(kind, save)
    return made.__new__(made)
