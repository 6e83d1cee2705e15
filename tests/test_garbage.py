"""Steps, runs and their errors leave no tensors to the garbage collector, which may run much later.

A tensor in a reference cycle keeps its memory: of a GPU, that of an old state or of a batch that did not fit.
"""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor

import fxtrain as fx

TX = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(1e-2))


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))


class Momentum(nn.Module):
    """Writes frozen parameters at each call."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
        return self.fast(x) + self.slow(x)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def writing(model, batch):
    batch["x"].add_(1)
    return loss_fn(model, batch)


def good():
    return {"x": torch.randn(6, 4), "y": torch.randint(3, (6,))}


def wrong_shape():
    return {"x": torch.randn(6, 5), "y": torch.randint(3, (6,))}


def wrong_label():
    return {"x": torch.randn(6, 4), "y": torch.full((6,), 7)}


def tensors_left(call):
    """Returns the tensors with memory that two calls leave in reference cycles, after some others that may cache."""
    for _ in range(3):
        call()
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(2):
            call()
        gc.collect()
        left = [item for item in gc.garbage if isinstance(item, torch.Tensor)]
        # Tracers leave tensors without memory.
        kept = [item for item in left if not isinstance(item, FakeTensor) and item.device.type != "meta"]
        return [(type(tensor).__name__, tuple(tensor.shape)) for tensor in kept]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        (gc.enable if was_enabled else gc.disable)()


def test_a_cycle_is_noticed():
    def call():
        cycle = [torch.ones(2)]
        cycle.append(cycle)

    assert tensors_left(call) == [("Tensor", (2,))] * 2


@pytest.mark.parametrize(
    ("make", "loss", "options"),
    [
        (network, loss_fn, {}),
        (network, loss_fn, {"accumulate": 2}),
        (network, loss_fn, {"callbacks": [fx.callbacks.ema(0.9), fx.callbacks.nan_guard()]}),
        (network, loss_fn, {"precision": "bf16"}),
        (network, loss_fn, {"differentiate": "autograd"}),
        (network, writing, {}),
        (Momentum, loss_fn, {}),
        (Checkpointed, loss_fn, {}),
        (lambda: fx.remat(network()), loss_fn, {}),
    ],
    ids=["plain", "accumulate", "callbacks", "bf16", "autograd", "writing", "frozen", "checkpoint", "remat"],
)
def test_uncompiled_step(make, loss, options):
    step, state = fx.train_step(loss, TX, **options), fx.init(make(), TX, seed=0)

    def call():
        nonlocal state
        state, _ = step(state, good())

    assert tensors_left(call) == []


def test_evaluation():
    step, state = fx.eval_step(lambda model, batch: {"loss": loss_fn(model, batch)}), fx.init(network(), TX, seed=0)
    assert tensors_left(lambda: step(state, good())) == []
    assert tensors_left(lambda: fx.evaluate(state, step, [good()])) == []


@pytest.mark.parametrize("is_ensemble", [False, True])
def test_run(tmp_path, is_ensemble):
    step, measure = fx.train_step(loss_fn, TX), fx.eval_step(lambda model, batch: {"loss": loss_fn(model, batch)})
    states = [fx.init(network(), TX, seed=seed) for seed in range(2)]
    state, folders = fx.ensemble.stack(states) if is_ensemble else states[0], itertools.count()

    def saving():
        return {"checkpointer": fx.checkpointer(tmp_path / str(next(folders))), "snapshot_every": 2}

    def call():
        fx.fit(
            state,
            step,
            [good() for _ in range(4)],
            steps=4,
            callbacks=[fx.callbacks.early_stopping("loss", patience=5)],
            eval_step=measure,
            eval_data=[good()],
            progress=False,
            **({} if is_ensemble else saving()),
        )

    assert tensors_left(call) == []


@pytest.mark.parametrize("traceback", ["short", "full"])
@pytest.mark.parametrize("batch", [wrong_shape, wrong_label])
@pytest.mark.parametrize("way", ["step", "autograd", "compiled", "fit", "evaluate"])
def test_error(monkeypatch, way, batch, traceback):
    monkeypatch.setenv("FXTRAIN_TRACEBACK", traceback)
    step = fx.train_step(loss_fn, TX, differentiate="autograd" if way == "autograd" else "auto")
    measure = fx.eval_step(lambda model, batch: {"loss": loss_fn(model, batch)})
    compiled = fx.compile(step, on_recompile="allow") if way == "compiled" else step
    state = fx.init(network(), TX, seed=0)
    calls = {
        "fit": lambda: fx.fit(state, step, [batch()], steps=1, progress=False),
        "evaluate": lambda: fx.evaluate(state, measure, [batch()]),
    }

    def call():
        try:
            calls.get(way, lambda: compiled(state, batch()))()
        except (RuntimeError, IndexError):
            return
        raise AssertionError("expected an error, got none.")

    if way == "compiled":
        compiled(state, good())
    assert tensors_left(call) == []


class Failing:
    """An observer that may not fail, and does at an event."""

    required = True

    def __init__(self, event):
        self.event = event

    def __call__(self, state, event, control):
        if type(event) is self.event:
            raise ValueError("failed")


def failing_callback(state, event: fx.StepEnd):
    raise ValueError("failed")


def failing_data():
    yield good()
    raise ValueError("failed")


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"callbacks": [failing_callback]},
        lambda: {"observers": [Failing(fx.StepEnd)]},
        lambda: {"observers": [Failing(fx.FitEnd)]},
        lambda: {"data": failing_data()},
        lambda: {"data": fx.data.prefetch(failing_data())},
        lambda: {"epoch": 2},
        lambda: {"checkpointer": fx.checkpointer("/proc/no/folder")},
    ],
    ids=["callback", "observer", "last event", "data", "prefetched data", "unknown argument", "checkpointer"],
)
def test_error_in_a_run(make):
    step, state = fx.train_step(loss_fn, TX), fx.init(network(), TX, seed=0)

    def call():
        given = {"data": [good()], "steps": 3, **make()}
        try:
            fx.fit(state, step, given.pop("data"), progress=False, **given)
        except (ValueError, TypeError, fx.CheckpointError):
            return
        raise AssertionError("expected an error, got none.")

    assert tensors_left(call) == []


def no_space(descriptor):
    raise OSError(28, "No space left on device")


def test_failed_save(tmp_path, monkeypatch):
    """The error of the background thread is raised by the next call."""
    step, state = fx.train_step(loss_fn, TX), fx.init(network(), TX, seed=0)
    folders = itertools.count()

    def call():
        checkpoints = fx.checkpointer(tmp_path / str(next(folders)))
        with pytest.raises(fx.CheckpointError):
            fx.fit(state, step, [good()], steps=1, checkpointer=checkpoints, progress=False)

    monkeypatch.setattr("os.fsync", no_space)
    assert tensors_left(call) == []


def test_dtypes_that_do_not_match():
    class Mixed(nn.Linear):
        def forward(self, x):
            return super().forward(x.double())

    step, state = fx.train_step(loss_fn, TX), fx.init(Mixed(4, 3), TX, seed=0)

    def call():
        with pytest.raises(RuntimeError, match="matching dtypes"):
            step(state, good())

    assert tensors_left(call) == []
