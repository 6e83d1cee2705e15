"""The training loop: ``steps`` is a generator of events, and ``fit`` drains it.

Events fire in this order (indented: only where they apply)::

    session begins      FitBegin
                            Restored                        the state was read from a checkpoint
    an epoch begins     EpochBegin
    a step              StepBegin
                            Microbatch, once for each       inside the compiled step
                            Gradients
                            Updated
                        StepEnd
    a rewind is due     Rewound                             other pending requests are dropped
    evaluation is due   EvalBegin
                            EvalStepBegin, EvalStep         for each batch
                        EvalEnd
    the epoch is over   EpochEnd
    a save is due       SaveBegin                           then the state is copied, and written in the background
    a save is committed Saved                               before the next step, or at the end of the session
    session ends            Interrupted                     by a signal or an exception
                            SaveBegin, Saved                the final save, unless the stop requests none
                        FitEnd                              not after an exception

Each event that publishes metrics or logged values is followed by ``Published``, if a callback or an observer names it.

``FitBegin`` accepts the requests ``stop`` and ``save``, and ``Restored`` accepts ``stop``. How often these events fire
depends on interruptions, so they cannot request anything else. Request an evaluation before the first step at
``EpochBegin``.

After an exception of a callback, the step or the data, the run rolls back to the state before the failing event.
``Interrupted`` fires, that state is saved, observers are closed, and ``fit`` raises the exception without ``FitEnd``.
If the step has donated that state, it cannot be saved, and a resume continues from the last checkpoint.

The epoch hooks of other trainers map to one event each: ``EpochBegin`` is before the epoch and before its training,
because no evaluation precedes the steps. ``EvalBegin`` is after the training of the epoch, and ``EpochEnd`` after its
evaluation.

With ``steps_per_call=k``, k steps are one dispatch: ``StepBegin`` fires k times, for observers only, then all traced
events fire, and then ``StepEnd`` fires k times, with the state after all k steps.
"""

from fxtrain.loop._evaluation import evaluate
from fxtrain.loop._fit import Result, fit, steps

__all__ = [
    "Result",
    "evaluate",
    "fit",
    "steps",
]
