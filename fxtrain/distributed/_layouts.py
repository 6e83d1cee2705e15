"""Layouts of a state: which tensors the ranks split, and along which axis of the mesh."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Literal

from fxtrain.core import check_choice, check_int, describe

Split = Literal["column", "row"]
"""``"column"`` splits the outputs of a module, and ``"row"`` its inputs."""

Plan = Mapping[str, Split]
"""The modules to split, by names or shell patterns."""


@dataclasses.dataclass(frozen=True)
class FullySharded:
    """Large tensors are split among all ranks. Made by ``fsdp``.

    Args:
        axis: The axis of the mesh along which they are split.
        least: The number of elements from which a parameter is split.
    """

    axis: Literal["data"]
    least: int


@dataclasses.dataclass(frozen=True)
class TensorParallel:
    """Modules are split among the ranks of a model. Made by ``tensor_parallel``.

    Args:
        plan: Maps module names or patterns to "column" or "row".
    """

    plan: Plan


Layout = FullySharded | TensorParallel
"""How the ranks share a state: the argument of ``fxtrain.shard``."""


def fsdp(axis: Literal["data"] = "data", *, least: int = 2**16) -> FullySharded:
    """Returns the layout of fully sharded data parallel training, for ``fxtrain.shard``.

    Parameters with ``least`` elements or more are split evenly along their first axis whose size the number of ranks
    divides. Optimizer state and slots with the shape of such a parameter, such as moments and averages, are split like
    it. All other leaves, and all buffers, stay on all ranks.

    ``train_step(mesh=mesh)`` gathers the parameters before the forward pass and sums each gradient to the rank that
    has its part. A compiled step does so bucket by bucket, which takes less memory: see ``reshard`` of ``compile``.
    ``eval_step(mesh=mesh)`` gathers parameters too. The mesh must have one rank per model.

    Args:
        axis: The axis of the mesh along which tensors are split. Each batch is split along it too.
        least: The number of elements from which a parameter is split.

    Raises:
        ValueError: If the axis is not "data".

    Example:
        >>> import torch, fxtrain as fx
        >>> mesh = fx.distributed.mesh()
        >>> state = fx.init(torch.nn.Linear(512, 512), fx.optim.adamw(1e-3))
        >>> state = fx.shard(state, mesh, fx.distributed.fsdp("data", least=2**10))
        >>> fx.distributed.gathered(state).params["weight"].shape
        torch.Size([512, 512])

    References:
        Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models"
        (arXiv:1910.02054).
    """
    if axis != "data":  # pyright: ignore[reportUnnecessaryComparison]
        raise ValueError(
            f"expected axis to be 'data', got {describe(axis)}. To split modules among the ranks of a model, give "
            "fxtrain.shard the layout fxtrain.distributed.tensor_parallel."
        )
    check_int("least", least, minimum=1)
    return FullySharded(axis, least)


def tensor_parallel(plan: Plan) -> TensorParallel:
    """Returns the layout of tensor parallel training, for ``fxtrain.shard``: the ranks of a model have it together.

    The plan lists modules of class ``Linear`` by their names or shell patterns. Of a "column" module, each rank of
    ``mesh.model`` has some of the outputs, and of a "row" module some of the inputs, which are the outputs of the
    column modules called before it:

        column:  y_r = x A_r^T + b_r            [..., features / ranks]
        row:     z = sum_r y_r B_r^T + c        [..., features], on all ranks

    No tensor is gathered. Each row module adds an all-reduce to the forward pass, and each input of column modules one
    to the backward pass. Between the two, a model must take the number of features or heads from its tensors, which are
    parts, and may neither sample, as dropout does, nor use parameters that are not split, both of which raise. It must
    call the modules: code that reads their weights gets parts. All else stays on all ranks, which must read the same
    examples if they share a model. Optimizer state and averages of a parameter are split like it.

    Args:
        plan: Maps module names or patterns to "column" or "row".

    Raises:
        TypeError: If the plan is no mapping.
        ValueError: If it has another value than "column" or "row".

    Example:
        A multilayer perceptron of which each rank has some hidden features:

        >>> import torch, fxtrain as fx
        >>> network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> mesh = fx.distributed.mesh(model=1)  # the number of ranks of the model
        >>> state = fx.shard(fx.init(network), mesh, fx.distributed.tensor_parallel({"0": "column", "2": "row"}))

    References:
        Shoeybi et al. 2019, "Megatron-LM: training multi-billion parameter language models using model parallelism"
        (arXiv:1909.08053).
    """
    if not isinstance(plan, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"expected plan to be a dict from module names to 'column' or 'row', got {describe(plan)}. Write it as "
            "{'blocks.*.up': 'column', 'blocks.*.out': 'row'}."
        )
    for pattern, kind in plan.items():
        check_choice(f"plan[{pattern!r}]", kind, typing.get_args(Split))
    return TensorParallel(dict(plan))
