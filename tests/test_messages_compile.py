"""Mistakes in compiled steps name the line of the user and what to do, in few lines."""

import pytest
import torch
from messages import BATCH, STEP, TX, loss_fn, said, start

import fxtrain as fx

MAX_LINES = 15


def printing(model, batch):
    loss = loss_fn(model, batch)
    print(loss)
    return loss


def branching(model, batch):
    loss = loss_fn(model, batch)
    if loss > 1:
        loss = loss * 2
    return loss


def with_other_key(model, batch):
    return model(batch["inputs"]).mean()


def call(loss, batch=BATCH, **options):
    return fx.compile(fx.train_step(loss, TX), **options)(start(), batch)


MISTAKES = {
    "print of a tensor": (
        lambda: call(printing),
        (
            "UserWarning: A tensor is formatted as text at FILE while the step is traced. It has no values "
            "there, and the line does not run again in later steps. Return the tensor as a metric instead."
        ),
    ),
    "if on a tensor": (
        lambda: call(branching),
        (
            "UserWarning: <step train_step(branching), fires Microbatch, Gradients, Updated> cannot be traced "
            "as one graph:\n"
            "  FILE in branching: if loss > 1:\n"
            "  Python reads the value of a tensor here (if, while, assert, .item(), float() or similar), but one "
            "graph serves all values. Use torch.where, or keep the value in a tensor.\n"
            "Compiled instead: the step as one graph for the values that Python reads, which the graph checks "
            "at each call. Results are the same. fx.explain(step, state, batch) lists all such places. "
            "fx.compile(step, fullgraph=True) makes this an error."
        ),
    ),
    "if on a tensor in one graph": (
        lambda: call(branching, fullgraph=True),
        (
            "GraphBreakError: expected a step that is one graph (fullgraph=True), got <step "
            "train_step(branching), fires Microbatch, Gradients, Updated>:\n"
            "  FILE in branching: if loss > 1:\n"
            "  Python reads the value of a tensor here (if, while, assert, .item(), float() or similar), but one "
            "graph serves all values. Use torch.where, or keep the value in a tensor.\n"
            "fx.explain(step, state, batch) lists all such places. Change them, or leave out fullgraph=True to "
            "compile only part of the step."
        ),
    ),
    "a missing key of the batch": (
        lambda: call(with_other_key),
        "KeyError: 'inputs'\nThe batch has batch['x']: float32 [4, 2], batch['y']: float32 [4, 1].",
    ),
    "another size of the batch": (
        lambda: call(loss_fn, {"x": torch.ones(4, 3), "y": torch.zeros(4, 1)}),
        (
            "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x3 and 2x1)\n"
            "The batch has batch['x']: float32 [4, 3], batch['y']: float32 [4, 1]."
        ),
    ),
    "a mode with a typo": (
        lambda: fx.compile(STEP, mode="reduce_overhead"),
        (
            "ValueError: expected mode to be one of None, 'ahead-of-time', 'reduce-overhead', 'default', "
            "'lite', 'max-autotune', 'max-autotune-no-cudagraphs', got 'reduce_overhead'. Did you mean "
            "'reduce-overhead'?"
        ),
    ),
    "a backend with a typo": (
        lambda: fx.compile(STEP, backend="inductorr"),
        (
            "ValueError: expected backend to be a function or the name of a backend of torch.compile, got "
            "'inductorr'. Did you mean 'inductor'? torch.compiler.list_backends() lists the names."
        ),
    ),
    "another optimizer in init": (
        lambda: fx.compile(fx.train_step(loss_fn, fx.optim.adam(0.1)))(start(), BATCH),
        (
            "ValueError: expected the optimizer state of adam(0.1), got one without "
            "state.opt_state[0].count.values and 4 more. Give the same tx to fxtrain.init and to "
            "fxtrain.train_step."
        ),
    ),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_compiled_step_is_explained(mistake, message):
    seen = said(mistake)
    assert seen == message
    assert seen.count("\n") < MAX_LINES
