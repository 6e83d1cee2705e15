"""The loop: ``steps`` is a generator, and ``fit`` drains it.

The firing order, by what leads to each event (indented: only where it applies)::

    session begins      FitBegin
                            Restored                        the state came from the checkpointer
    an epoch begins     EpochBegin
    a step              StepBegin
                            Microbatch, once for each       inside the compiled step
                            Gradients
                            Updated
                        StepEnd
    a rewind is due     Rewound                             and nothing else that was due
    evaluation is due   EvalBegin, EvalStep for each batch, EvalEnd
    the epoch is over   EpochEnd
    a save is due                                           the state is copied, and written in the background
    a save is committed Saved                               before the next step, or the end of the session
    session ends            Interrupted                     by a signal or an error
                            Saved                           the last one, unless the stop is to save nothing
                        FitEnd

Requests at FitBegin and Restored are ``stop`` and, at FitBegin, ``save``: how often these events fire depends on
interruptions, so nothing that counts in the run is requested there. An evaluation before the first step is requested at
EpochBegin.

A step compiled with ``steps_per_call=k`` is taken k times at once: k times ``StepBegin``, which observers alone see,
then all that is inside the step, then k times ``StepEnd``, over the state after all of them.
"""

from fxtrain.loop._evaluate import evaluate as evaluate
from fxtrain.loop._fit import Result as Result
from fxtrain.loop._fit import fit as fit
from fxtrain.loop._fit import steps as steps
from fxtrain.loop._history import History as History
from fxtrain.loop._history import Series as Series
