"""Steps inside a context: each call enters it, and wrong arguments are refused."""

import contextlib

import problem
import pytest

import fxtrain as fx
from fxtrain import testing


def test_wrap_step_enters_the_context_at_each_step_and_evaluation():
    inside = []

    @contextlib.contextmanager
    def context(name):
        inside.append(name)
        yield
        inside.append(f"/{name}")

    step = fx.wrap_step(problem.step(), lambda: context("step"))
    eval_step = fx.wrap_step(problem.eval_step, lambda: context("eval"))
    result = fx.fit(problem.start(), step, problem.data(), epochs=1, eval_step=eval_step, eval_data=problem.data(1))
    assert inside == ["step", "/step"] * 3 + ["eval", "/eval"]
    alone = fx.fit(problem.start(), problem.step(), problem.data(), epochs=1)
    testing.assert_equal(result.state.params, alone.state.params, "parameters")


@pytest.mark.parametrize(
    ("step", "context", "message"),
    [(3, print, "expected a step, got 3"), (print, 3, "function that makes a context, got 3")],
)
def test_wrap_step_refuses_other_types(step, context, message):
    with pytest.raises(TypeError, match=message):
        fx.wrap_step(step, context)
