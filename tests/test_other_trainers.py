"""The table of other trainers' hooks: each counterpart fires in a run, or is a public function."""

import collections
import functools
import pathlib
import re

import problem
import pytest

import fxtrain as fx
from fxtrain.core import EVENTS

HOOKS = {  # the number of hooks in the documentation of each system
    "Dream Trainer": 21 + 2 + 1 + 2 + 2,
    "Forgather and Hugging Face": 16 + 5,
    "The plugin-style LM trainer": 12,
    "Keras": 16,
    "Lightning": 33,
    "Logging and displays": 22,
}
PAGE = pathlib.Path(__file__).parent.parent / "notebooks/other_trainers.md"
ROWS = [
    (section.split("\n", 1)[0], hook, here)
    for section in PAGE.read_text().split("\n## ")[1:]
    for hook, here in re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, re.M)
]
NAMES = {kind.__name__: kind for kind in EVENTS}


@pytest.fixture(scope="module")
def fired(tmp_path_factory):
    """The events of a run that evaluates, saves, is interrupted by an error and resumed."""
    seen = set()

    def watch(state, event):
        seen.add(type(event).__name__)
        return state, fx.Control()

    callback = fx.compose(fx.on(EVENTS, watch), fx.when(fx.every(2), fx.callbacks.save()))
    checkpointer = fx.checkpointer(tmp_path_factory.mktemp("run"))
    step = problem.step(callbacks=callback)
    fit = functools.partial(
        fx.fit,
        problem.start(),
        callbacks=callback,
        eval_step=problem.eval_step,
        eval_data=problem.data(1),
        checkpointer=checkpointer,
    )

    def fails(batch):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(
            step,
            fx.data.sequence(problem.data()).map(lambda b, i: fails(b) if i == 4 else b, with_position=True),
            epochs=2,
        )
    fit(step, problem.data(), epochs=2, resume=True)
    return seen


def test_table_has_all_hooks_of_each_system():
    assert collections.Counter(system for system, _, _ in ROWS) == HOOKS
    assert len({(system, hook) for system, hook, _ in ROWS}) == sum(HOOKS.values())


@pytest.mark.parametrize("here", [pytest.param(here, id=f"{system}: {hook}") for system, hook, here in ROWS])
def test_counterpart_is_callable_or_fires(here, fired):
    values = r"values\.[A-Z][a-zA-Z]+"
    functions = re.findall(rf"\bfx\.({values}|[a-z_.]+[a-z_])|\bfx\.(Control)", here)
    events = [word for word in re.findall(r"[A-Z][A-Za-z]+", here) if word in NAMES]
    assert functions or events or here.startswith("not needed: ")
    for name in (lower or upper for lower, upper in functions):
        assert callable(functools.reduce(getattr, name.split("."), fx)), name
    for event in events:
        assert event in fired, event
