"""The counterparts of classes of Keras, Lightning and transformers, as advice for error messages."""

from __future__ import annotations

from collections.abc import Mapping

from fxtrain.equivalents import class_of
from fxtrain.equivalents._arguments import ARGUMENTS

_PROGRESS = "Use observers=[fxtrain.observers.progress()]."
_SUMMARY = ARGUMENTS["enable_model_summary"]
_SCHEDULE = "Use a schedule as the learning rate, such as fxtrain.optim.adamw(fxtrain.schedules.cosine(1e-3, 1000))."
_EMA = "Use fxtrain.callbacks.ema(0.999), and evaluate the average with fit(eval_view=fxtrain.callbacks.averaged)."
_CHECKPOINTER = "Use checkpointer=fxtrain.checkpointer(folder)."
_BEST = (
    'Use fxtrain.callbacks.save_best("loss") with checkpointer=fxtrain.checkpointer(folder, best="loss"), or '
    "fxtrain.callbacks.save(every=1000)."
)
_EARLY = (
    'Use fxtrain.callbacks.early_stopping("loss", patience=3), and fxtrain.callbacks.restore_best("loss") for the best '
    "weights."
)
_FREEZING = 'Train with some parameters, then continue with others: fxtrain.with_trainable(result.state, tx, "head.*").'
_FUNCTION = "Write a function (state, event) whose annotation chooses the event, such as event: fxtrain.EpochEnd."
_WRITE = "Use observers=[fxtrain.observers.write({})]."
_NO_WRITER = "There is no writer for it. Write an observer, a function (state, event, control), that calls its client."

CALLBACKS: Mapping[str, str] = {
    # Keras
    "BackupAndRestore": "Use checkpointer=fxtrain.checkpointer(folder) and resume=True, which resumes to the bit.",
    "Callback": _FUNCTION,
    "CallbackList": "Give callbacks=[...], or combine them with fxtrain.compose.",
    "CSVLogger": _WRITE.format("fxtrain.writers.csv(path)"),
    "EarlyStopping": _EARLY,
    "History": "Use result.history of fxtrain.fit, which has every curve.",
    "LambdaCallback": _FUNCTION,
    "LearningRateScheduler": _SCHEDULE,
    "ModelCheckpoint": _BEST,
    "OrbaxCheckpoint": _BEST,
    "ProgbarLogger": _PROGRESS,
    "ReduceLROnPlateau": 'Use fxtrain.callbacks.reduce_on_plateau("loss") with fxtrain.optim.inject_hyperparams.',
    "RemoteMonitor": _NO_WRITER,
    "SwapEMAWeights": _EMA,
    "TensorBoard": _WRITE.format("fxtrain.writers.tensorboard(folder)"),
    "TerminateOnNaN": "Use fxtrain.callbacks.nan_guard(patience=1).",
    # Lightning
    "BackboneFinetuning": _FREEZING,
    "BaseFinetuning": _FREEZING,
    "BasePredictionWriter": "Write an observer of fxtrain.EvalStep, with fxtrain.eval_step(measure, outputs=True).",
    "BatchSizeFinder": "Use fxtrain.find_batch_size before the run.",
    "Checkpoint": _CHECKPOINTER,
    "DeviceStatsMonitor": "Use observers=[fxtrain.observers.system(), fxtrain.observers.memory()].",
    "EMAWeightAveraging": _EMA,
    "GradientAccumulationScheduler": (
        "There is no schedule of accumulation: fxtrain.train_step(loss_fn, tx, accumulate=4) is constant in a run. "
        "Continue with another step: fxtrain.fit(result.state, step, data, epochs=10)."
    ),
    "LearningRateFinder": "Use fxtrain.find_learning_rate before the run.",
    "LearningRateMonitor": "Leave it out: fxtrain.train_step adds the metric learning_rate.",
    "ModelPruning": "There is no counterpart. Set parameters to zero with state.replace(params=...) in a callback.",
    "ModelSummary": _SUMMARY,
    "OnExceptionCheckpoint": "Use checkpointer=fxtrain.checkpointer(folder) with fxtrain.callbacks.save(every=100).",
    "ProgressBar": _PROGRESS,
    "RichModelSummary": _SUMMARY,
    "RichProgressBar": _PROGRESS,
    "SpikeDetection": "Use fxtrain.callbacks.spike_guard().",
    "StochasticWeightAveraging": "Use fxtrain.callbacks.swa(start=1000).",
    "ThroughputMonitor": "Use fxtrain.callbacks.throughput().",
    "Timer": "Use fxtrain.callbacks.time_limit(hours=8).",
    "TQDMProgressBar": _PROGRESS,
    "WeightAveraging": _EMA,
    # Lightning's loggers
    "CometLogger": _NO_WRITER,
    "LitLogger": _NO_WRITER,
    "Logger": _WRITE.format("fxtrain.writers.jsonl(path)"),
    "MLFlowLogger": _WRITE.format("fxtrain.writers.mlflow(folder)"),
    "TensorBoardLogger": _WRITE.format("fxtrain.writers.tensorboard(folder)"),
    "WandbLogger": _WRITE.format("fxtrain.writers.wandb(folder)"),
    # transformers
    "CallbackHandler": "Give each of its callbacks.",
    "DefaultFlowCallback": "Or use fit(eval_when=500) and fxtrain.callbacks.save(every=500).",
    "EarlyStoppingCallback": _EARLY,
    "MLflowCallback": _WRITE.format("fxtrain.writers.mlflow(folder)"),
    "NotebookProgressCallback": _PROGRESS,
    "PrinterCallback": _PROGRESS,
    "ProgressCallback": _PROGRESS,
    "TensorBoardCallback": _WRITE.format("fxtrain.writers.tensorboard(folder)"),
    "TrainerCallback": _FUNCTION,
    "Trainer": (
        "The trainer is fxtrain.fit(state, step, data, epochs=10). notebooks/12_other_trainers.ipynb has the place of "
        "each argument."
    ),
    "TrainingArguments": ARGUMENTS["args"],
    "WandbCallback": _WRITE.format("fxtrain.writers.wandb(folder)"),
}
"""Advice by class name. Subclasses inherit the advice on their bases."""

_BY_PART = {
    "early": _EARLY,
    "checkpoint": _BEST,
    "plateau": CALLBACKS["ReduceLROnPlateau"],
    "lrscheduler": _SCHEDULE,
    "averaging": CALLBACKS["StochasticWeightAveraging"],
    "ema": _EMA,
    "accumulation": ARGUMENTS["accumulate_grad_batches"],
    "nan": CALLBACKS["TerminateOnNaN"],
    "timer": CALLBACKS["Timer"],
    "timelimit": CALLBACKS["Timer"],
    "progress": _PROGRESS,
    "tqdm": _PROGRESS,
    "tensorboard": CALLBACKS["TensorBoard"],
    "wandb": CALLBACKS["WandbLogger"],
    "mlflow": CALLBACKS["MLFlowLogger"],
    "csv": CALLBACKS["CSVLogger"],
    "logger": CALLBACKS["Logger"],
    "summary": _SUMMARY,
}
"""Advice by parts of class names in lower case, for classes of other libraries."""


def advice_on_callback(value: object) -> str:
    """Returns advice on a callback, an observer or a logger of a training library, or a class of one.

    Example:
        >>> advice_on_callback(type("Timer", (), {"__module__": "lightning.pytorch.callbacks"}))
        'Use fxtrain.callbacks.time_limit(hours=8).'
    """
    kind = class_of(value)
    names = [base.__name__ for base in kind.__mro__]
    by_base = next((CALLBACKS[name] for name in names if name in CALLBACKS), None)
    name = kind.__name__.lower()
    by_part = next((advice for part, advice in _BY_PART.items() if part in name), None)
    general = by_base in (None, _FUNCTION, CALLBACKS["Logger"], CALLBACKS["Checkpoint"])
    advice = (by_part if general and by_part else by_base) or "See fxtrain.callbacks and fxtrain.observers."
    if "TrainerCallback" not in names:
        return advice
    direct = f"Give fxtrain.interop.hf({kind.__name__}(...)) as a callback, which runs it as it is."
    if advice == _FUNCTION and kind.__name__ != "TrainerCallback":
        return direct
    return f"{direct} {advice.replace('Use ', 'Or use ', 1)}"
