"""All callbacks combined: a run cut at any step and resumed ends with the same state as an uninterrupted run."""

import problem
import pytest

import fxtrain as fx
from fxtrain import callbacks as cb
from fxtrain import optim, testing

STEPS = 12


def transform():
    adamw = optim.inject_hyperparams(optim.adamw)(learning_rate=1e-2, weight_decay=0.1)
    slowly = optim.unfreeze(adamw, {"0.*": 2, "*": 0})
    clipped = optim.clip_by_global_norm(1.0)
    return optim.chain(clipped, optim.lookahead(optim.every_k(slowly, lambda count: 1 + count // 4), period=3))


def callbacks():
    """Returns the callbacks of the step, and all callbacks."""
    traced = fx.compose(
        cb.nan_guard(),
        cb.spike_guard("grad_norm", deviations=3.0, window=6, warmup=3, rewind=1),
        cb.ema(0.9, warmup=True, buffers=True),
        cb.swa(start=3, every=2),
        cb.epoch_mean("loss", "mae"),
        cb.grad_norms(layer="*"),
        cb.grad_flow(every=2),
        cb.grad_profile(every=2),
        cb.weight_stats(),
        cb.update_ratios(worst=2),
        *[cb.histograms(of, every=3, sample=8) for of in ("grads", "weights", "updates")],
        cb.stop_on_overfitting("loss", patience=20),
    )
    looped = fx.compose(
        cb.time_limit(hours=1),
        cb.stop_at("loss", -1.0),
        cb.stop_on_divergence("loss", 1e9),
        cb.early_stopping("loss", patience=50),
        cb.restore_best("loss"),
        cb.reduce_on_plateau("loss", patience=0, factor=0.5),
        cb.schedule_hyperparam("weight_decay", fx.schedules.linear(0.1, 0.0, transition_steps=STEPS)),
        cb.throughput(samples=8, every=2),
        fx.when(fx.every(1), cb.save()),
        fx.when(fx.at(5), cb.evaluate()),
    )
    return traced, fx.compose(traced, looped)


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def run(request):
    """Returns a function (folder, steps) that runs the training and returns the result of fit."""
    traced, together = callbacks()
    loss_fn = fx.tap(problem.loss_fn, "2", cb.activation_stats)
    step = fx.train_step(loss_fn, transform(), callbacks=traced)
    step = fx.compile(step, on_recompile="error") if request.param else step

    def run(folder, steps):
        return fx.fit(
            fx.init(problem.module(), transform()),
            step,
            problem.data(),
            steps=steps,
            callbacks=together,
            eval_step=problem.eval_step,
            eval_data=problem.data(seed=1),
            eval_when=fx.every(3),
            eval_view=lambda state: cb.averaged(state, "swa"),
            checkpointer=fx.checkpointer(folder, keep=4),
            resume=True,
            clock=lambda: 0.0,
        )

    return run


def test_run_resumed_after_any_step_equals_whole_run(run, tmp_path):
    whole = run(tmp_path / "whole", STEPS)
    assert whole.reason == f"reached {STEPS} steps"
    for cut in range(1, STEPS):
        run(tmp_path / str(cut), cut)
        testing.assert_equal(run(tmp_path / str(cut), STEPS).continue_from, whole.continue_from, f"cut after {cut}")


def test_every_callback_was_active(run, tmp_path):
    result = run(tmp_path, STEPS)
    slots, history = result.continue_from.slots, result.history
    assert int(slots["spike_guard"].count) > 3
    assert int(slots["swa"].count) > 0
    rates = [
        v for path, v in optim.get_hyperparams(result.continue_from.opt_state).items() if path.endswith("learning_rate")
    ]
    assert len(rates) == 2
    assert max(rates) < 1e-2
    logged = {name.partition("/")[0] for name in history}
    assert {"grad_norm", "grad_flow", "weights", "update_ratio", "epoch", "early_stopping"} <= logged
    assert {"train/learning_rate/0.*", "train/learning_rate/*"} <= set(history)
