"""Cut anywhere, resumed in a new process: events, requests, logs and states are the uninterrupted run's, to the bit.

A part of the cuts; `python -m benchmarks.reliability --full` makes all of them.
"""

import pytest

from benchmarks.reliability.exact import Exactness, all_steps

pytestmark = pytest.mark.slow


def test_eager_at_every_tenth_step_and_inside_what_is_due(tmp_path):
    run = Exactness(tmp_path)
    assert run.resumed(all_steps(every=10), "arrays") == []
    assert run.interrupted(["EvalStep", "EvalEnd", "EpochEnd"], "arrays") == []


def test_compiled(tmp_path):
    run = Exactness(tmp_path, compiled=True)
    assert run.resumed([11, 37], "arrays") == []
    assert run.interrupted(["EvalStep"], "arrays") == []


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [("arrays", "prefetch", 23), ("workers=0", "workers=2", 23), ("prefetch workers=2", "workers=0", 8)],
)
def test_read_ahead_and_by_another_number_of_workers(tmp_path, before, after, step):
    assert Exactness(tmp_path, data=before).resumed([step], after) == []


def test_a_run_that_differs_is_told_apart(tmp_path):
    run = Exactness(tmp_path, data="workers=0")  # whose samples are noisy
    (difference,) = run.resumed([40], "arrays")
    assert difference.startswith('resumed after step 40: {"event": "StepBegin", "step": 41')
