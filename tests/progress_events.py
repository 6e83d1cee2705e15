"""Events of runs and of evaluations, as observers get them."""

import math

from fxtrain.core import Control, EpochEnd, EvalBegin, EvalEnd, EvalStep, FitBegin, FitEnd, StepEnd

NOTHING = Control()


def see(observer, *events):
    for event in events:
        observer(None, event, NOTHING)


def ended(step, **metrics):
    return StepEnd(step=step, time=float(step), metrics=metrics or {"loss": float(step)})


def run(*, evaluated=True, reason="reached 20 steps"):
    """Yields the events of 20 steps.

    Compilation takes 30 s, a step 2 s (0.5 s of them waiting for data), and each of two evaluations 3 s.
    """
    time = 30.0

    def at(kind, step, **fields):
        epochs = step // 10 if kind in (FitBegin, EpochEnd, FitEnd) else (step - 1) // 10
        fields |= {"epochs_done": epochs, "epoch_start": 10 * epochs, "epoch_length": 10}
        return kind(step=step, position=step, total_steps=20, total_epochs=2, time=time, **fields)

    yield at(FitBegin, 0)
    for step in range(1, 21):
        yield at(StepEnd, step, data_wait=0.5, metrics={"loss": 4.0 - step / 10, "norm": 1.0})
        if step % 10 == 0 and evaluated:
            yield at(EvalBegin, step)
            for index in range(3):
                time += 1
                yield at(EvalStep, step, index=index, batch=None, metrics={})
            yield at(EvalEnd, step, metrics={"loss": step / 5, "accuracy": 0.25})
        if step % 10 == 0:
            yield at(EpochEnd, step, metrics={"loss": step / 4, "norm": 1.0}, duration=20.0 + 3 * evaluated)
        time += 2
    yield at(FitEnd, 20, reason=reason)


def bits(metrics):
    return metrics["loss"] / math.log(2)


def evaluation(batches, time=0.0, **begin):
    yield EvalBegin(step=5, time=time, **begin)
    for index in range(batches):
        yield EvalStep(step=5, time=time + 4.0 * (index + 1), index=index, batch=None, metrics={})
