"""Rosetta: every hook of other trainers, and what they show a person; and what serves it here.

On the right are events, which a callback or an observer subscribes to by annotating its second parameter; functions of
fxtrain, as ``fx.name``; or the reason that it is not needed. ``at`` says where else to look. A callback returns what it
wants changed, so a hook that exists only to return something has no counterpart.

Dream Trainer
    pre_launch                    the lines of the script before fx.init; nothing happens on import
    pre_configure                 the lines before fx.init
    post_configure                the lines after fx.init
    pre_setup                     the lines before fx.fit
    post_setup                    FitBegin
    pre_fit                       FitBegin
    post_fit                      FitEnd
    pre_epoch                     EpochBegin
    post_epoch                    EpochEnd, after the evaluation that is due at the epoch's last step
    pre_train_epoch               EpochBegin
    post_train_epoch              EpochEnd; averages over the epoch by fx.callbacks.epoch_mean
    pre_train_step                StepBegin; to change the batch, fx.data.sequence(...).map
    post_train_step               StepEnd
    pre_optimizer_step            Gradients; to change them, fx.optim.chain
    post_optimizer_step           Updated
    pre_optimizer_zero_grad       not needed: gradients are values, and nobody adds to them
    post_optimizer_zero_grad      not needed: gradients are values, and nobody adds to them
    pre_validation_epoch          EvalBegin
    post_validation_epoch         EvalEnd
    pre_validation_step           EvalStep of the batch before, or EvalBegin
    post_validation_step          EvalStep
    train_context                 fx.wrap_step
    validation_context            fx.wrap_step, of the evaluation step
    on_interrupt                  Interrupted
    state_dict                    fx.stateful: memory is in the state, and so in every checkpoint
    load_state_dict               fx.restore
    RankZeroCallback              fx.observers.rank_zero
    Callback[Mixin]               fx.needs

Forgather and Hugging Face
    on_init_end                   FitBegin
    on_train_begin                FitBegin
    on_train_end                  FitEnd
    on_epoch_begin                EpochBegin
    on_epoch_end                  EpochEnd
    on_step_begin                 StepBegin
    on_pre_optimizer_step         Gradients, before clipping, which is a part of the optimizer here
    on_optimizer_step             Updated
    on_substep_end                Microbatch
    on_step_end                   StepEnd
    on_evaluate                   EvalEnd
    on_prediction_step            EvalStep
    on_predict                    EvalEnd; outside of a run fx.evaluate
    on_save                       Saved, with the path, once it is on the disk
    on_log                        StepEnd, EvalEnd and every other event: an observer is given what was logged there
    on_push_begin                 Saved; nothing is pushed anywhere by itself
    control.should_training_stop  fx.Control, stop=
    control.should_epoch_stop     fx.Control, end_epoch=
    control.should_save           fx.Control, save=
    control.should_evaluate       fx.Control, evaluate=
    control.should_log            fx.Control, log=

The plugin-style LM trainer
    on_train_start                FitBegin
    on_train_end                  FitEnd
    on_epoch_start                EpochBegin
    on_epoch_end                  EpochEnd
    on_batch_start                StepBegin
    on_batch_end                  StepEnd
    on_forward_end                Microbatch; what is inside the model by fx.tap
    on_backward_end               Gradients
    on_step_end                   Updated
    on_snapshot_save              fx.stateful: memory is in the state, and so in every snapshot
    on_snapshot_load              Restored
    should_stop_training          fx.Control, stop=, heard at once and not once an epoch

Keras
    on_train_begin                FitBegin
    on_train_end                  FitEnd
    on_epoch_begin                EpochBegin
    on_epoch_end                  EpochEnd
    on_train_batch_begin          StepBegin
    on_train_batch_end            StepEnd
    on_test_begin                 EvalBegin
    on_test_end                   EvalEnd
    on_test_batch_begin           EvalStep of the batch before, or EvalBegin
    on_test_batch_end             EvalStep
    on_predict_begin              EvalBegin; outside of a run fx.view
    on_predict_end                EvalEnd
    on_predict_batch_begin        EvalStep of the batch before, or EvalBegin
    on_predict_batch_end          EvalStep, with the outputs
    set_model                     not needed: the state is the first argument
    set_params                    not needed: an event says how many steps and epochs there are to be

Lightning
    setup                         FitBegin
    teardown                      FitEnd; an observer's close
    on_fit_start                  FitBegin
    on_fit_end                    FitEnd
    on_sanity_check_start         fx.evaluate, before the run
    on_sanity_check_end           fx.evaluate, before the run
    on_train_start                FitBegin
    on_train_end                  FitEnd
    on_train_epoch_start          EpochBegin
    on_train_epoch_end            EpochEnd
    on_train_batch_start          StepBegin
    on_train_batch_end            StepEnd
    on_before_zero_grad           not needed: gradients are values, and nobody adds to them
    on_before_backward            not needed: the loss and its gradients are one function; see fx.gradients
    on_after_backward             Microbatch, each substep's; Gradients, averaged
    on_before_optimizer_step      Gradients
    on_validation_start           EvalBegin
    on_validation_end             EvalEnd
    on_validation_epoch_start     EvalBegin
    on_validation_epoch_end       EvalEnd
    on_validation_batch_start     EvalStep of the batch before, or EvalBegin
    on_validation_batch_end       EvalStep
    on_test_start                 EvalBegin; outside of a run fx.evaluate
    on_test_end                   EvalEnd; outside of a run fx.evaluate
    on_test_batch_end             EvalStep
    on_predict_start              fx.view
    on_predict_end                fx.view
    on_predict_batch_end          fx.view
    on_save_checkpoint            fx.stateful: memory is in the state, and so in every checkpoint
    on_load_checkpoint            Restored
    state_dict                    fx.stateful: memory is in the state, and so in every checkpoint
    load_state_dict               fx.restore
    on_exception                  Interrupted

What these systems show a person
    LoggerCallback                fx.observers.write
    MetricLoggerCallback          fx.observers.write; by classes fx.callbacks.confusion_matrix and fx.callbacks.curves
    MediaLoggerCallback           fx.callbacks.samples, fx.callbacks.predictions
    ModelWatchCallback            fx.callbacks.watch, inside the step, where gradients are
    TrainerSummary                fx.observers.summary
    ProgressBar                   fx.observers.progress
    ProgressCallback              fx.observers.progress
    InfoCallback                  fx.observers.summary
    TBLogger                      fx.writers.tensorboard
    JsonLogger                    fx.writers.jsonl
    TextgenCallback               fx.callbacks.textgen
    GradLogger                    fx.callbacks.grad_norms, fx.callbacks.grad_flow
    WandBLoggerMixin              fx.writers.wandb
    log_scalar                    fx.Control, log=; a number, or a tensor of shape []
    log_dict                      fx.Control, log=
    log_images                    fx.values.Image
    log_videos                    fx.values.Video
    log_histogram                 fx.values.Histogram
    log_table                     fx.values.Table
    log_plot                      fx.values.Figure
    log_config                    fx.observers.write, hparams=; fx.observers.record_run
    log_model                     fx.observers.record_code, and fx.callbacks.save
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One hook."""

    system: str
    hook: str
    here: str


def rows() -> list[Row]:
    """The table above.

    Example:
        >>> [row.here for row in rows() if row.hook == "on_substep_end"]
        ['Microbatch']
    """
    assert __doc__ is not None
    found, system = [], ""
    for line in __doc__.split("\n\n", 2)[2].splitlines():
        if line.startswith("    "):
            hook, here = line.split(maxsplit=1)
            found.append(Row(system, hook, here))
        elif line:
            system = line
    return found
