"""The training that a configuration describes: its keys are the arguments of one function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

import fxtrain as fx
from fxtrain.cli._device import device_named
from fxtrain.cli._errors import ConfigError
from fxtrain.cli._factories import read
from fxtrain.cli._ranks import Parallel, joined, placed
from fxtrain.data import SourceLike
from fxtrain.fold import When


def training(
    model: nn.Module,
    optimizer: fx.optim.GradientTransformation,
    loss: Callable[..., object],
    data: SourceLike,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    eval_data: SourceLike | None = None,
    measure: Callable[..., object] | None = None,
    eval_when: When | None = None,
    eval_view: Callable[[fx.TrainState], fx.TrainState] | None = None,
    callbacks: Sequence[fx.Callback] = (),
    observers: Sequence[fx.Observer] = (),
    checkpointer: fx.Checkpointer | None = None,
    compile: bool | Mapping[str, object] = True,  # noqa: A002
    device: str = "auto",
    parallel: Parallel = "none",
    plan: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    precision: str | fx.Policy | None = None,
    accumulate: int = 1,
    differentiate: Literal["auto", "func", "autograd"] = "auto",
    outputs: bool = False,
    transform_batch: Callable[..., Any] | None = None,
    snapshot_every: int | None = None,
    snapshots: int = 2,
    snapshots_on_host: bool = False,
    rewind_limit: int = 3,
    lag: Literal[0, 1] | None = None,
    run: Mapping[str, object] | None = None,
    shared: object = None,
) -> dict[str, Any]:
    """Returns the arguments of ``fxtrain.fit``, from those of ``init``, ``train_step``, ``eval_step`` and ``compile``.

    Args:
        model: The module. Its weights are initialized with ``seed``.
        optimizer: From ``fxtrain.optim``.
        loss: The loss function ``(model, batch)``, as for ``fxtrain.train_step``.
        data: A source of batches.
        steps: Total number of steps.
        epochs: Total number of epochs. If both limits are given, the first one reached ends the run.
        seed: Seed of weights and dropout. The order of the data has its own seed, as in ``batches``.
        eval_data: A source of batches for evaluations.
        measure: The function of the evaluation, as for ``fxtrain.eval_step``. Defaults to ``loss``.
        eval_when: When to evaluate, as for ``fit``. By default, at the end of each epoch and of the run.
        eval_view: The state to evaluate, as for ``fit``.
        callbacks: From ``fxtrain.callbacks``, or functions ``(state, event)``.
        observers: In addition to those of the command.
        checkpointer: By default, the three newest checkpoints are kept in the folder of the run.
        compile: Whether to compile each step into one graph, or the options of ``fxtrain.compile``.
        device: The device: cpu, cuda, or auto, which uses cuda if available.
        parallel: How several processes, which torchrun starts, train one model. "ddp" splits each batch among them.
            "fsdp" also splits large parameters and their optimizer state. "tp" splits the modules of ``plan``.
        plan: With ``parallel="tp"``, the modules to split, as for ``fxtrain.distributed.tensor_parallel``.
        dtype: The dtype of floating-point parameters.
        precision: As for ``fxtrain.train_step`` and ``eval_step``.
        accumulate: As for ``fxtrain.train_step``, as are ``differentiate``, ``outputs`` and ``transform_batch``.
        differentiate: How to differentiate.
        outputs: Whether the step returns outputs.
        transform_batch: A function of each batch.
        snapshot_every: As for ``fit``, as are the options below.
        snapshots: Number of snapshots to retain.
        snapshots_on_host: Where to retain them.
        rewind_limit: Rewinds to one step after which the run stops.
        lag: After how many steps stop flags are read.
        run: The project, group, name, tags and description of the run, as for ``fxtrain.RunInfo``.
        shared: Any value. It is a place for objects with anchors, which other keys use by aliases.

    Example:
        >>> loss = lambda model, batch: (model(batch) - 1).square().mean()
        >>> options = training(nn.Linear(1, 1), fx.optim.sgd(0.1), loss, [torch.ones(4, 1)], steps=9, compile=False)
        >>> fx.fit(**options).reason
        'reached 9 steps'
    """
    if (plan is not None) != (parallel == "tp"):
        raise ConfigError(
            f"expected a plan with parallel=tp and only then, got parallel={parallel} and "
            f"{'no plan' if plan is None else 'a plan'}. Change one of them."
        )
    mesh = joined(parallel)
    step: Any = fx.train_step(
        loss,
        optimizer,
        accumulate=accumulate,
        precision=precision,
        differentiate=differentiate,
        outputs=outputs,
        transform_batch=transform_batch,
        mesh=mesh,
    )
    eval_step: Any = None
    if eval_data is not None:
        eval_step = fx.eval_step(measure or loss, precision=precision, transform_batch=transform_batch, mesh=mesh)
    if compile is not False:
        options: dict[str, Any] = {} if compile is True else dict(compile)
        step = read(options, functools.partial(fx.compile, step), "compile", "compile").make()
        of_both = {name: value for name, value in options.items() if name not in _OF_TRAINING_STEPS}
        eval_step = eval_step and fx.compile(eval_step, **of_both)
    state = fx.init(model, optimizer, seed=seed, device=device_named(device, "device", mesh), dtype=dtype)
    return {
        "state": placed(state, mesh, parallel, plan),
        "step": step,
        "data": data,
        "steps": steps,
        "epochs": epochs,
        "eval_step": eval_step,
        "eval_data": eval_data,
        "eval_when": eval_when,
        "eval_view": eval_view,
        "callbacks": fx.compose(*callbacks),
        "observers": observers,
        "checkpointer": checkpointer,
        "snapshot_every": snapshot_every,
        "snapshots": snapshots,
        "snapshots_on_host": snapshots_on_host,
        "rewind_limit": rewind_limit,
        "lag": lag,
        "mesh": mesh,
        "run": read(run, fx.RunInfo, "run", "run").make(),
    }


_OF_TRAINING_STEPS = ("donate", "steps_per_call")

DEFINING = (
    "model",
    "optimizer",
    "loss",
    "data",
    "seed",
    "dtype",
    "precision",
    "accumulate",
    "differentiate",
    "transform_batch",
)
"""The keys that define what is trained. A resumed run cannot change them. All others may change."""
