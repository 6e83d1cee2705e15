"""Outputs of training steps: logits or attention maps that a loss function returns next to the loss."""

import problem
import pytest
import torch
from problem import SMALL_BATCH, linear

import fxtrain as fx
from fxtrain import testing

TX = fx.optim.sgd(0.1)


def loss_fn(model, batch):
    made = model(batch)
    return (made.square().mean(), {"size": made.abs().mean()}), {"made": made, "parts": [made.sum(), batch]}


def start():
    return fx.init(linear(), TX)


def step(**options):
    return fx.train_step(loss_fn, TX, outputs=True, **options)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("differentiate", ["func", "autograd"])
@pytest.mark.parametrize("backend", [None, "dynamo", "aot_eager"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_outputs_have_the_rows_of_the_batch(differentiate, backend, accumulate):
    taken = step(accumulate=accumulate, differentiate=differentiate)
    if backend == "dynamo" and differentiate == "func":
        taken = torch.compile(taken, fullgraph=True, backend="aot_eager")
    elif backend == "aot_eager":
        taken = fx.compile(taken, backend=backend, donate=True)
    state = start()
    wanted = fx.view(state)(SMALL_BATCH).detach()
    outputs = taken(state, SMALL_BATCH)[1].outputs
    torch.testing.assert_close(outputs["made"], wanted)
    assert not outputs["made"].requires_grad
    total, batch = outputs["parts"]
    torch.testing.assert_close(total, wanted.sum() if accumulate == 1 else wanted.view(2, 2).sum(1))
    assert torch.equal(batch, SMALL_BATCH)


def test_outputs_do_not_change_the_update():
    plain = fx.train_step(lambda model, batch: loss_fn(model, batch)[0], TX)
    (new, output), (wanted, told) = step()(start(), SMALL_BATCH), plain(start(), SMALL_BATCH)
    testing.assert_equal(new, wanted, "state")
    testing.assert_equal(output.metrics, told.metrics, "metrics")
    assert told.outputs is None


def test_vmapped_members_have_own_outputs():
    both = fx.tree.map(lambda leaf: torch.stack([leaf, leaf]), start())
    _, output = torch.vmap(step(), in_dims=(0, None))(both, SMALL_BATCH)
    assert output.outputs["made"].shape == (2, 4, 1)


def test_mean_gradient_concatenates_outputs():
    find = fx.gradients(loss_fn, outputs=True)
    parts = [find(start(), part, index) for index, part in enumerate(SMALL_BATCH.split(1))]
    assert torch.equal(fx.step.mean_gradient(parts).outputs["parts"][1], SMALL_BATCH)
    assert fx.gradients(lambda model, batch: model(batch).sum())(start(), SMALL_BATCH).outputs is None


@pytest.mark.parametrize("way", ["plain", "multi-step", "compiled"])
def test_callback_logs_an_image_of_the_outputs_at_step_end(way):
    def picture(state, event: fx.StepEnd):
        return state, fx.Control(log={"made": fx.values.Image(event.outputs["made"].sigmoid())})

    shown = {}

    def keep(state, event: fx.StepEnd, control):
        shown[event.step] = control.log["made"].value.frames, event.outputs["made"].sigmoid()

    taken = {
        "plain": step,
        "multi-step": lambda: problem.Together(step(), 2),
        "compiled": lambda: fx.compile(step(), backend="aot_eager", steps_per_call=2),
    }[way]()
    data = [SMALL_BATCH * scale for scale in (1.0, 2.0, 3.0)]
    fx.fit(start(), taken, data, steps=5, callbacks=picture, observers=keep)
    assert sorted(shown) == [1, 2, 3, 4, 5]
    for frames, made in shown.values():
        assert frames.shape == (1, 4, 1, 1)
        torch.testing.assert_close(
            torch.from_numpy(frames[0, :, 0, 0]), (255 * made[:, 0]).round().byte(), atol=1, rtol=0
        )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model, batch: model(batch).sum(), r"to return a pair \(loss, outputs\) because of outputs=True, got a"),
        (
            lambda model, batch: (model(batch).sum(), "text"),
            r"the outputs of <lambda> .* to be tensors, .* got 'text'\.",
        ),
        (lambda model, batch: (model(batch).sum(), {"a": None}), r"got None\. Leave it out\."),
    ],
)
def test_invalid_results_are_refused(function, message):
    with pytest.raises(TypeError, match=message):
        fx.train_step(function, TX, outputs=True)(start(), SMALL_BATCH)


def test_pair_without_the_option_suggests_it():
    with pytest.raises(TypeError, match=r"return the pair \(loss, outputs\) with outputs=True\."):
        fx.train_step(lambda model, batch: (model(batch).sum(), model(batch)), TX)(start(), SMALL_BATCH)
