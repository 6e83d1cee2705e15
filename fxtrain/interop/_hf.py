"""Callbacks of transformers as callbacks of fxtrain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fxtrain.core import Callback, TrainState
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.fold import Composed

if TYPE_CHECKING:
    from transformers import (  # pyright: ignore[reportMissingImports]
        TrainerCallback,  # pyright: ignore[reportUnknownVariableType]
        TrainingArguments,  # pyright: ignore[reportUnknownVariableType]
    )


@with_short_traceback
def hf(
    *callbacks: TrainerCallback | type[TrainerCallback],
    args: TrainingArguments | None = None,
    processing_class: object = None,
    train_dataloader: Iterable[Any] | None = None,
    eval_dataloader: Iterable[Any] | None = None,
    name: str | None = None,
    transient: Sequence[str] = (),
    memory: int = 1 << 14,
    history: int = 1 << 18,
) -> Composed:
    """Makes callbacks of transformers' ``Trainer`` a callback of fxtrain.

    Their methods are called in the order of ``Trainer``, with its arguments, and their flags become requests:

    - ``on_init_end`` and ``on_train_begin`` at ``FitBegin``, ``on_epoch_begin`` at ``EpochBegin``, ``on_step_begin`` at
      ``StepBegin``, ``on_step_end`` at ``StepEnd``, ``on_prediction_step`` at ``EvalStep``, ``on_evaluate`` at
      ``EvalEnd``, ``on_epoch_end`` at ``EpochEnd``, ``on_save`` at ``Saved``, and ``on_train_end`` at ``FitEnd``.
    - ``on_substep_end``, ``on_pre_optimizer_step`` and ``on_optimizer_step`` at ``StepEnd``, before ``on_step_end``,
      because a compiled step cannot call them. Those before the optimizer see the parameters from before the update
      and their gradients, which the step copies to a slot if a callback has such a method.
    - ``on_log`` when ``args`` say so (``logging_strategy``, ``logging_steps``), after each evaluation, and at the end.
    - ``on_predict`` and ``on_push_begin`` by ``hf_event``, because ``fit`` neither predicts nor pushes.

    Evaluations and saves take place when ``fit`` says so, or when a callback sets a flag. Give
    ``transformers.DefaultFlowCallback()`` first to have both, and the end of the run, follow ``args``. If
    ``args.eval_strategy`` is ``"epoch"``, the evaluation at the end of an epoch comes after ``on_epoch_end``.

    Callback state is kept in the slot, so it is saved and restored, unlike in ``Trainer`` by default. It consists of
    the result of ``ExportableState.state()``, and of attributes that are numbers, strings, tensors or containers of
    these. Other attributes, such as open files, stay on the object. Values that ``on_train_begin`` sets apply to a new
    run. A resumed run restores the saved ones.

    ``model`` is a module with the parameters of the state. It is filled only while a callback runs. Writes to its
    values reach the state, or raise at events where the state cannot change. Other changes, such as hooks or settings
    of layers, raise. ``optimizer`` and ``lr_scheduler`` show the learning rates. Rates that
    ``fxtrain.optim.inject_hyperparams`` keeps in the state can be set in ``optimizer.param_groups``.

    Args:
        callbacks: Callbacks or their classes. As in ``Trainer``, those given together share a ``control``, whose flags
            a later one can clear. The requests of those in separate calls are joined.
        args: Passed to all methods. By default metrics are logged every 500 steps, evaluations belong to epochs, and
            the best metric is the lowest evaluation ``"loss"``.
        processing_class: Passed to all methods.
        train_dataloader: Passed to all methods. By default an object with the length of the data only.
        eval_dataloader: As ``train_dataloader``.
        name: The name of the slot. Required to use several callbacks of the same class in separate calls.
        transient: Names of attributes that belong to the process instead of the run, such as counters of a display.
        memory: Bytes reserved for callback state.
        history: Bytes reserved for ``state.log_history``. The oldest entries are dropped beyond it, with a warning.

    Returns:
        A callback for ``fit``.

    Raises:
        ModuleNotFoundError: If transformers is not installed.
        ImportError: If accelerate is not installed, and ``args`` are not given.
        TypeError: If a callback is not one of transformers, or at run time, if the state is that of several runs.
        ValueError: If there is no callback, or at run time, if callback state does not fit, the evaluation lacks the
            best metric, or the state is that of several modules.
        RuntimeError: At run time, if a callback changes the model in a way that cannot reach the state.

    Example:
        >>> import torch, fxtrain as fx
        >>> from transformers import EarlyStoppingCallback  # doctest: +SKIP
        >>> tx = fx.optim.sgd(0.0)  # never improves
        >>> result = fx.fit(  # doctest: +SKIP
        ...     fx.init(torch.nn.Linear(1, 1), tx),
        ...     fx.train_step(lambda model, batch: model(batch).square().mean(), tx),
        ...     [torch.ones(2, 1)],
        ...     epochs=9,
        ...     callbacks=fx.interop.hf(EarlyStoppingCallback(3)),
        ...     eval_step=fx.eval_step(lambda model, batch: model(batch).square().mean()),
        ...     eval_data=[torch.ones(2, 1)],
        ... )
        >>> result.reason  # doctest: +SKIP
        'EarlyStoppingCallback set should_training_stop'
    """
    try:
        from fxtrain.interop._hf_events import composed
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("interop.hf requires transformers. Install it: pip install 'fxtrain[hf]'.") from error
    return composed(
        callbacks,
        args,
        shared={
            "processing_class": processing_class,
            "train_dataloader": train_dataloader,
            "eval_dataloader": eval_dataloader,
        },
        name=name,
        transient=frozenset(transient),
        sizes=(memory, history),
    )


@with_short_traceback
def hf_event(
    hook: Literal["on_predict", "on_push_begin"],
    state: TrainState,
    callbacks: Callback | Iterable[Callback],
    *,
    metrics: dict[str, float] | None = None,
) -> TrainState:
    """Calls a method of callbacks made by ``hf`` that no event of ``fit`` calls.

    Args:
        hook: ``"on_predict"``, after a prediction by ``fxtrain.evaluate``, or ``"on_push_begin"``, before an upload.
        state: The state, with the slots of the callbacks. It is not modified.
        callbacks: Those given to ``fit``. Callbacks not made by ``hf`` are ignored.
        metrics: For ``on_predict``. Names get the prefix ``"test_"``, as in ``Trainer``.

    Returns:
        The state with the new callback state, and with the callbacks' writes to the model.

    Raises:
        ValueError: If ``hook`` is another method, which ``fit`` calls at an event, or if ``hf`` made no callback.

    Example:
        >>> import torch, fxtrain as fx
        >>> from transformers import ProgressCallback  # doctest: +SKIP
        >>> progress = fx.interop.hf(ProgressCallback)  # doctest: +SKIP
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), progress)  # doctest: +SKIP
        >>> state = fx.interop.hf_event("on_predict", state, progress, metrics={"loss": 0.5})  # doctest: +SKIP
    """
    from fxtrain.interop._hf_events import fired

    return fired(hook, state, callbacks, metrics)
