"""Creates the state at step 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxtrain import tree
from fxtrain.core import Due, TrainState, Tree, check_device, describe
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.equivalents import refuse_foreign, with_known_arguments
from fxtrain.model._model import Model
from fxtrain.model._types import Modules, Transforms
from fxtrain.optim import GradientTransformation


@with_short_traceback
@with_known_arguments
def init(
    model: Modules,
    tx: Transforms = None,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TrainState:
    """Returns the state at step 0 of training ``model`` with ``tx``. The module is not modified.

    Parameters that do not require gradients are frozen: they are not trained and have no optimizer state. Tied
    parameters stay tied: they are one leaf, under the first of their names. A module in eval mode is trained in
    training mode. Submodules in eval mode inside a module in training mode, such as frozen batch norms, stay in eval
    mode. Hooks and other functions that a module holds see the modules of the state in place of those that they close
    over.

    Args:
        model: A module, or a pytree (such as a dict) of modules and tensors. A bare tensor is a parameter.
        tx: A gradient transformation, a dict of them with the keys of a dict of modules, or None.
        seed: Seed of all random samples of the run: a 64-bit int.
        device: Device of the state. Defaults to where the model is.
        dtype: Dtype that floating parameters are cast to. By default they keep their own.

    Returns:
        A state that shares no memory with the model.

    Raises:
        TypeError: If a leaf of ``model`` is neither a module nor a tensor, is lazy, compiled or distributed, or cannot
            be copied; if ``tx`` is not a gradient transformation; or if ``seed`` is not a 64-bit int.
        ValueError: If the keys of ``tx`` are not those of ``model``; if a parameter shares memory with another
            parameter or buffer without being the same tensor; or if a function of a module reaches a part of the model
            as a global variable, or a parameter or buffer other than as an attribute.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(3, 2), fx.optim.adamw(1e-3), seed=0)
        >>> sorted(state.params), int(state.step)
        (['bias', 'weight'], 0)
    """
    refuse_other_leaves(model)
    _refuse_overlaps(model)
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise TypeError(f"expected seed to be a 64-bit int, got {describe(seed)}.")
    check_device("device", device)
    if dtype is not None and not isinstance(dtype, torch.dtype):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected dtype to be a floating-point dtype such as torch.bfloat16, got {describe(dtype)}. Pass a "
            "torch.dtype."
        )
    architecture = Model(model)
    params, buffers = architecture.clone_tensors(model)
    params = tree.map(lambda leaf: leaf.to(device, dtype if leaf.is_floating_point() else None), params)
    buffers = tree.map(lambda leaf: leaf.to(device), buffers)
    where = tree.device_of((params, buffers)) or device
    return TrainState(
        step=torch.tensor(0, device=where),
        params=params,
        buffers=buffers,
        opt_state=init_optimizer(tx, architecture.split(params), model),
        seed=torch.tensor(seed, device=where),
        position=torch.tensor(0, device=where),
        slots={},
        due=Due.start(where),
        model=architecture,
    )


def init_optimizer(tx: Transforms, params: Tree, model: Modules | None = None) -> Tree:
    """Returns the initial optimizer state of ``tx`` for these trainable parameters.

    Args:
        tx: A gradient transformation, a dict of them, or None.
        params: The trainable parameters.
        model: The model given to ``init``, for errors.
    """
    if tx is None:
        return {}
    if isinstance(tx, GradientTransformation):
        return tx.init(params)
    if not isinstance(tx, Mapping):
        refuse_foreign("tx", "a gradient transformation", tx, model)
        raise TypeError(
            f"expected tx to be a gradient transformation or a dict of them, got {describe(tx)}. Make one with a "
            "function of fx.optim, such as fx.optim.adamw(1e-3)."
        )
    if not isinstance(params, Mapping) or set(tx) != set(params):
        refuse_foreign("tx", "a gradient transformation", dict(tx), model)
        keys = sorted(params) if isinstance(params, Mapping) else "none"
        raise ValueError(
            f"expected tx to have the keys of the model ({keys}), got {sorted(tx)}. Give one transformation for each."
        )
    models: Any = model if isinstance(model, Mapping) else {}
    return {name: init_optimizer(each, params[name], models.get(name)) for name, each in tx.items()}


def refuse_other_leaves(model: Modules, root: str = "model") -> None:
    """Raises unless a tree consists of tensors and modules that can be copied and called functionally.

    Args:
        model: The tree.
        root: Its name, for errors.
    """
    if isinstance(model, TrainState):
        raise TypeError(
            "expected a module or a pytree of modules and tensors, got a TrainState, which is already initialized."
        )
    for path, leaf in zip(tree.paths(model, root), tree.leaves(model), strict=True):
        if not isinstance(leaf, nn.Module | Tensor):
            raise TypeError(
                f"expected modules, tensors, or a pytree of them, got {describe(leaf)} at {path}. {_remedy_for(leaf)}"
            )
        if isinstance(leaf, Tensor):
            continue
        if any(nn.parameter.is_lazy(value) for value in (*leaf.parameters(), *leaf.buffers())):
            raise TypeError(
                f"expected modules with known shapes, got lazy parameters in {path}. Run it once on a batch first."
            )
        for name, part in leaf.named_modules():
            place = f"{path}.{name}" if name else path
            if isinstance(part, torch.jit.ScriptModule) or (part is leaf and hasattr(leaf, "_orig_mod")):
                raise TypeError(
                    f"expected uncompiled modules, got a compiled one ({type(part).__name__}) at {place}. Give the "
                    "original module, and compile the step: fxtrain.compile(step)."
                )
            _refuse_distributed(place, part)


_DISTRIBUTED_CLASSES = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def _refuse_distributed(path: str, module: nn.Module) -> None:
    """Raises for wrappers that distribute a module."""
    found = next((base.__name__ for base in type(module).__mro__ if base.__name__ in _DISTRIBUTED_CLASSES), None)
    if found is not None:
        itself = "without fully_shard" if found == "FSDPModule" else "itself, the .module of the wrapper"
        raise TypeError(
            f"expected modules that are not distributed, got {path}, made by {found}. Give the module {itself}. To "
            "train on several devices, give train_step and fit a mesh: fxtrain.distributed.mesh()."
        )


def _remedy_for(leaf: object) -> str:
    """Returns the last sentence of the error: how to get a module from the leaf."""
    if isinstance(leaf, type):
        return f"Make an instance: {leaf.__name__}(...)."
    if isinstance(leaf, Iterator):
        return "Give the module itself, or a list of its parameters."
    return "Give the module that the loss function calls."


def _refuse_overlaps(model: Modules) -> None:
    """Raises for overlapping parameters: they change together in torch, but would be separate leaves of a state."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for path, leaf in zip(tree.paths(model, "model"), tree.leaves(model), strict=True):
        if isinstance(leaf, nn.Module):
            for name, value in (*leaf.named_parameters(), *leaf.named_buffers()):
                tensors.setdefault(id(value), (f"{path}.{name}", value))
    last_path, last_end, last_trained = "", 0, False
    for start, end, path, trained in sorted(
        filter(None, (_memory_range(path, value) for path, value in tensors.values()))
    ):
        if start < last_end and (trained or last_trained):
            raise ValueError(
                f"expected parameters that do not share memory, got {last_path} and {path}, which overlap. Tie them by "
                "assigning one Parameter to both modules, or copy one of them with .clone()."
            )
        if end > last_end:
            last_path, last_end, last_trained = path, end, trained


def _memory_range(path: str, value: Tensor) -> tuple[int, int, str, bool] | None:
    """Returns a tensor's memory range, or None if it is empty or has gaps in which other tensors may lie."""
    plain = value.layout == torch.strided and not value.is_meta and type(value) in (Tensor, nn.Parameter)
    if not plain or not value.numel():
        return None
    count = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    if count != value.numel():
        return None
    start = value.data_ptr()
    return start, start + count * value.element_size(), path, value.requires_grad
