"""A GAN with two modules, two optimizers and a custom step: it compiles, stops early, saves and resumes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxtrain as fx
from fxtrain import testing

NOISE, SIZE = 16, 128  # RNG stream of the noise, batch size
TX = {"generator": fx.optim.adam(2e-3, b1=0.5), "discriminator": fx.optim.adam(2e-3, b1=0.5)}


def ring(count, seed=0):
    """Returns batches of points around eight centers on a circle."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(0, 8, (count, SIZE), generator=generator) * (2 * math.pi / 8)
    places = torch.stack([angle.cos(), angle.sin()], -1)
    return list(places + 0.05 * torch.randn(count, SIZE, 2, generator=generator))


def modules():
    def layers(*sizes):
        parts = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.LeakyReLU(0.2))]
        return nn.Sequential(*parts[:-1])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"generator": layers(4, 64, 64, 2), "discriminator": layers(2, 64, 64, 1)}


def start():
    return fx.init(modules(), TX, seed=1)


def discriminator_loss(model, batch):
    made = model["generator"](batch["noise"])
    return F.softplus(-model["discriminator"](batch["real"])).mean() + F.softplus(model["discriminator"](made)).mean()


def generator_loss(model, batch):
    return F.softplus(-model["discriminator"](model["generator"](batch["noise"]))).mean()


def moved(state, name, grads):
    """Returns the state after an optimizer update of one module."""
    updates, memory = TX[name].update(grads, state.opt_state[name], state.params[name])
    return state.replace(
        params={**state.params, name: fx.optim.apply_updates(state.params[name], updates)},
        opt_state={**state.opt_state, name: memory},
    )


def gan_step(state, real):
    key = fx.rng.key(state.seed, stream=NOISE, step=state.step)
    batch = {"real": real, "noise": fx.rng.normal(key, (real.shape[0], 4))}
    found = fx.gradients(discriminator_loss, wrt="discriminator")(state, batch)
    state = moved(state, "discriminator", found.grads)
    fooled = fx.gradients(generator_loss, wrt="generator")(state, batch, 1)
    state = moved(state, "generator", fooled.grads)
    return state, fx.StepOutput({"loss": fooled.loss, "discriminator_loss": found.loss})


@fx.eval_step
def measure(model, real):
    """The energy distance between generated and real points: 0 only for equal distributions."""
    made = model["generator"](torch.randn(real.shape[0], 4))
    spread = torch.cdist(made, made).mean() + torch.cdist(real, real).mean()
    return {"distance": 2 * torch.cdist(made, real).mean() - spread}


def run(state, steps, step=gan_step, **options):
    return fx.fit(
        state,
        step,
        ring(8),
        steps=steps,
        eval_step=measure,
        eval_data=ring(4, seed=1),
        eval_when=fx.every(50),
        **options,
    )


def test_compiled_gan_learns_ring_in_one_graph():
    def stop_when_good(state, event: fx.EvalEnd):
        return state, fx.Control(stop=event.metrics["distance"] < 0.03, reason="as good as the ring")

    graphs = CompileCounterWithBackend("aot_eager")
    state = start()
    before = fx.evaluate(state, measure, ring(4, seed=2))["distance"]
    result = run(state, 1500, fx.compile(gan_step, backend=graphs), callbacks=stop_when_good)
    after = fx.evaluate(result.state, measure, ring(4, seed=2))["distance"]
    assert result.reason == "as good as the ring"
    assert before > 0.5
    assert after < 0.05
    assert graphs.frame_count == 1
    made = fx.view(result.state)["generator"](torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)))
    assert float((made.norm(dim=-1) - 1).abs().median()) < 0.15


def test_gan_step_matches_autograd_and_torch_optim():
    state, real = start(), ring(1)[0]
    new, output = fx.Step(gan_step)(state, real)
    noise = fx.rng.normal(fx.rng.key(state.seed, stream=NOISE, step=state.step), (SIZE, 4))
    both, losses = modules(), {}
    for name, loss_fn in (("discriminator", discriminator_loss), ("generator", generator_loss)):
        optimizer = torch.optim.Adam(both[name].parameters(), lr=2e-3, betas=(0.5, 0.999))
        optimizer.zero_grad()
        losses[name] = loss_fn(both, {"real": real, "noise": noise})
        losses[name].backward()
        optimizer.step()
    for name, module in both.items():
        torch.testing.assert_close(new.params[name], dict(module.state_dict()))
    torch.testing.assert_close(output.metrics["loss"], losses["generator"].detach())


@pytest.mark.parametrize("compiled", [False, True])
def test_gan_resumes_bitwise(tmp_path, compiled):
    step = fx.compile(gan_step, backend="aot_eager") if compiled else gan_step
    callbacks = fx.compose(
        fx.callbacks.early_stopping("distance", patience=9), fx.when(fx.every(40), fx.callbacks.save())
    )
    checkpoints = fx.checkpointer(tmp_path, keep=None)
    whole = run(start(), 120, step, callbacks=callbacks, checkpointer=fx.checkpointer(tmp_path / "whole")).state
    run(start(), 70, step, callbacks=callbacks, checkpointer=checkpoints)
    assert checkpoints.steps() == [40, 70]
    resumed = run(start(), 120, step, callbacks=callbacks, checkpointer=checkpoints, resume=True).state
    testing.assert_equal(resumed, whole, "resumed")
