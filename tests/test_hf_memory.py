"""The memory of callbacks of transformers: kept in the slot, exact after a resume, a rewind and a repeated call."""

import pytest
import torch
from hugging_face import Model, TrainerCallback, arguments, batches, fit, loss_fn, transformers

import fxtrain as fx
from fxtrain import testing

EarlyStoppingCallback = transformers.EarlyStoppingCallback


class Counts(TrainerCallback):
    """Keeps data of many kinds, resets a counter in on_train_begin, and has attributes that are no data."""

    def __init__(self, patience=3):
        self.patience = patience
        self.best = None
        self.seen = []
        self.lines = set()
        self.handle = open  # no data

    def on_train_begin(self, args, state, control, **kwargs):
        self.wait = 0
        self.file = object()

    def on_step_end(self, args, state, control, **kwargs):
        self.wait += 1
        self.seen.append((state.global_step, {"wait": self.wait}))
        self.lines.add(state.global_step % 2)
        self.best = torch.tensor([1.0, float(state.global_step)])


def slots(state, callback):
    return {name: state.slots[name] for name in callback.slots}


def test_run_resumed_at_each_step_ends_with_the_same_memory(tmp_path):
    def run(**options):
        both = fx.compose(fx.interop.hf(Counts()), fx.interop.hf(EarlyStoppingCallback(2)))
        # Without a clock, because the log history has the duration of each evaluation.
        return fit(both, eval_when=3, clock=lambda: 0.0, **options)

    whole = run(epochs=3)
    for steps in range(1, 9):
        checkpointer = fx.checkpointer(tmp_path / str(steps))
        run(steps=steps, checkpointer=checkpointer)
        resumed = run(epochs=3, checkpointer=checkpointer, resume=True)
        testing.assert_equal(resumed.continue_from, whole.continue_from, f"resumed at {steps}")


def test_early_stopping_counts_on_after_a_resume(tmp_path):
    options = {"lr": 0.0, "epochs": 9}
    for epochs in (1, 2, 3):
        options = {"lr": 0.0, "epochs": epochs, "checkpointer": fx.checkpointer(tmp_path), "resume": epochs > 1}
        assert fit(fx.interop.hf(EarlyStoppingCallback(3)), **options).reason.startswith("finished")
    last = fit(fx.interop.hf(EarlyStoppingCallback(3)), **{**options, "epochs": 9, "resume": True})
    assert (int(last.state.step), last.reason) == (12, "EarlyStoppingCallback set should_training_stop")


def test_attributes_of_the_constructor_can_be_changed_for_a_resume(tmp_path):
    fit(fx.interop.hf(Counts(patience=3)), steps=2, checkpointer=fx.checkpointer(tmp_path))
    changed = Counts(patience=5)
    fit(fx.interop.hf(changed), steps=4, checkpointer=fx.checkpointer(tmp_path), resume=True)
    assert (changed.patience, changed.wait, len(changed.seen)) == (5, 4, 4)
    assert changed.handle is open


def test_exported_state_is_restored():
    class Exporting(TrainerCallback, transformers.trainer_callback.ExportableState):
        def __init__(self, scale=1):
            self.inner = type("Inner", (), {"count": 0, "scale": scale})()

        def state(self):
            return {"args": {"scale": self.inner.scale}, "attributes": {"count": self.inner.count}}

        @classmethod
        def from_state(cls, state):
            made = cls(**state["args"])
            made.inner.count = state["attributes"]["count"]
            return made

        def on_step_end(self, args, state, control, **kwargs):
            self.inner.count += 1

    first, second = Exporting(), Exporting()
    state = fit(fx.interop.hf(first), steps=3).continue_from
    tx = fx.optim.sgd(0.1)
    fx.fit(state, fx.train_step(loss_fn, tx), batches(), callbacks=fx.interop.hf(second), steps=5)
    assert (first.inner.count, second.inner.count) == (3, 5)


def test_same_state_gives_the_same_result_when_called_again():
    callback = fx.interop.hf(Counts())
    state, _ = callback(fx.attach(fx.init(Model()), callback), fx.FitBegin(step=0))
    event = fx.StepEnd(step=1, position=1, epoch_length=3, metrics={"loss": torch.tensor(1.0)})
    once, _ = callback(state, event)
    later, _ = callback(once, fx.StepEnd(step=2, position=2, epoch_length=3, metrics={"loss": torch.tensor(1.0)}))
    again, _ = callback(state, event)
    testing.assert_equal(again, once, "the state")
    assert bool(later.diff(once))


def test_rewind_rewinds_the_memory():
    callback = Counts()

    rewound = []

    def back(state, event: fx.StepEnd):
        rewound.append(event.step)
        return state, fx.Control(rewind=2 if rewound.count(5) == 1 and event.step == 5 else 0)

    fit(fx.compose(fx.interop.hf(callback), back), steps=7, snapshot_every=1)
    assert rewound == [1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert [step for step, _ in callback.seen] == [1, 2, 3, 4, 5, 6, 7]


def test_display_counts_from_its_session_on(tmp_path, capsys):
    fit(fx.interop.hf(transformers.ProgressCallback), steps=2, checkpointer=fx.checkpointer(tmp_path))
    fit(fx.interop.hf(transformers.ProgressCallback), steps=4, checkpointer=fx.checkpointer(tmp_path), resume=True)
    assert "4/4" in capsys.readouterr().err


def test_transient_attributes_are_not_kept(tmp_path):
    for steps in (2, 4):
        callback = Counts()
        made = fx.interop.hf(callback, transient=["wait"])
        fit(made, steps=steps, checkpointer=fx.checkpointer(tmp_path), resume=steps > 2)
    assert (callback.wait, len(callback.seen)) == (2, 4)


def test_memory_that_does_not_fit_is_an_error():
    with pytest.raises(
        ValueError, match=r"expected at most 700 bytes of attributes in callbacks of transformers, got"
    ) as e:
        fit(fx.interop.hf(Counts(), memory=700), steps=50)
    assert "Counts." in str(e.value)
    assert "memory=" in str(e.value)


def test_oldest_logs_are_dropped_with_a_warning():
    args = arguments("unused", logging_steps=1, metric_for_best_model="loss", greater_is_better=False)

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.entries = list(state.log_history)

    callback = Seen()
    with pytest.warns(UserWarning, match=r"log_history of hf/Seen is larger than 1,000 bytes, so its oldest"):
        fit(fx.interop.hf(callback, args=args, history=1000), steps=20)
    assert callback.entries[-1]["step"] == 19
    assert 0 < len(callback.entries) < 15


def test_finished_run_can_be_resumed_and_does_nothing(tmp_path):
    args = arguments(tmp_path, eval_strategy="no", logging_strategy="epoch")
    for _ in range(2):
        callback = fx.interop.hf(Counts(), args=args)
        result = fit(callback, steps=2, checkpointer=fx.checkpointer(tmp_path), resume=True)
        assert (int(result.state.step), result.reason) == (2, "reached 2 steps")


def test_slots_of_callbacks_of_one_class_need_names():
    with pytest.raises(ValueError, match="expected one callback for the slot 'hf/Counts'"):
        fit([fx.interop.hf(Counts()), fx.interop.hf(Counts())], steps=1)
    result = fit([fx.interop.hf(Counts(), name="first"), fx.interop.hf(Counts(), name="second")], steps=1)
    assert {"first", "second"} <= result.state.slots.keys()
