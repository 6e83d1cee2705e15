"""Scalars that many elements read are computed once per compiled step, with the same value in every loop."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fxtrain as fx
from fxtrain import optim, schedules
from fxtrain.compiler.passes._scalars import hoist_scalars, make_bias_corrections_exact

RATES = {
    "linear": schedules.linear(0.1, 0.0, transition_steps=10),
    "warmup": schedules.warmup(schedules.constant(0.1), 10),
    "cosine": schedules.warmup_cosine_decay(0.0, 0.1, warmup_steps=2, decay_steps=10),
    "exponential": schedules.exponential(0.1, 10, decay_rate=0.5, staircase=True),
}
AVERAGES = {
    "debiased": fx.callbacks.ema(0.999, debias=True, name="average"),
    "warming up": fx.callbacks.ema(0.999, warmup=True, name="average"),
    "mean": fx.callbacks.swa(start=0, name="average"),
}


def read_by_vectors(function, *arguments):
    """Returns the float64 scalars that vector operations of a traced graph read after the pass."""
    traced = make_fx(function, tracing_mode="fake")(*arguments)
    graph = hoist_scalars(traced.graph)
    return [
        source
        for node in graph.nodes
        if isinstance(value := node.meta.get("val"), torch.Tensor) and value.numel() > 1
        for source in node.all_input_nodes
        if isinstance(source.meta["val"], torch.Tensor)  # not a list of outputs
        if source.meta["val"].dtype == torch.float64 or (source.meta["val"].numel() == 1 and _is_derived(source))
    ]


def _is_derived(node):
    """Whether a scalar is computed from float64 scalars in the loop that reads it."""
    if node.op != "call_function" or "once" in str(node.target):
        return False
    sources = [source for source in node.all_input_nodes if isinstance(source.meta["val"], torch.Tensor)]
    return any(source.meta["val"].dtype == torch.float64 or _is_derived(source) for source in sources)


@pytest.mark.parametrize("name", RATES)
def test_schedule_is_computed_once_per_step(name):
    tx = optim.adamw(RATES[name], weight_decay=0.1)
    params = {"w": torch.ones(64)}

    def update(grads, state, weights):
        return tx.update(grads, state, weights)

    assert read_by_vectors(update, params, tx.init(params), params) == []


def test_bias_corrections_are_computed_as_one_vector():
    tx, params = optim.adam(0.1), {"a": torch.ones(64), "b": torch.ones(64)}

    def update(grads, state, weights):
        return tx.update(grads, state, weights)

    graph = hoist_scalars(make_fx(update, tracing_mode="fake")(params, tx.init(params), params).graph)
    corrections = [node for node in graph.nodes if "expm1" in str(node.target)]
    assert [tuple(node.meta["val"].shape) for node in corrections] == [(2,), (2,)]
    parted = [node.all_input_nodes[0] for node in graph.nodes if "unbind" in str(node.target)]
    assert len(parted) == 2
    assert all("once" in str(source.target) for source in parted)


def corrections(count, decay, weights):
    return torch.expm1(count.float() * decay), torch.expm1(count.double() * decay), torch.expm1(weights)


@pytest.mark.slow
def test_compiled_bias_corrections_are_as_precise_as_eager():
    count = torch.tensor([0, 1, 2, 5, 10, 100, 1000, 10**4, 10**6, 2**40, -5])
    weights = torch.linspace(-1, 1, 11)
    graph = make_fx(corrections, tracing_mode="fake")(count, torch.tensor(0.5), weights)
    make_bias_corrections_exact(graph.graph)
    graph.recompile()
    replaced = [node.target.namespace for node in graph.graph.nodes if "expm1" in str(node.target)]
    assert replaced == ["fxtrain", "fxtrain", "aten"]  # expm1 of weights is left to Inductor
    compiled = torch._inductor.compile(graph, [count, torch.tensor(0.5), weights])
    for decay in (0.999, 0.9, 0.5, 1e-30):
        given = count, torch.tensor(decay).log(), weights
        single, double, _ = corrections(*given)
        ours = compiled(*given)
        torch.testing.assert_close(ours[0], single, rtol=2e-7, atol=0)
        torch.testing.assert_close(ours[1], double, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", AVERAGES)
def test_update_weight_of_an_average_is_computed_once(name):
    state = fx.attach(fx.init({"w": torch.ones(64)}), AVERAGES[name])

    def update(memory, params, step):
        event = fx.Updated(
            step=step, loss=step.float(), metrics={}, grads={}, updates={}, skipped=torch.zeros_like(step).bool()
        )
        now = state.replace(params=params).with_slot("average", memory)
        return AVERAGES[name](now, event)[0].slots["average"]

    assert read_by_vectors(update, state.slots["average"], state.params, torch.tensor(3)) == []
