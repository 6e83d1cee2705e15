"""A run cut and resumed in a new process has bitwise the events, requests, logs and states of an uninterrupted run.

These tests make some of the cuts. `python -m benchmarks.reliability --full` makes all of them.
"""

import pytest

from benchmarks.reliability.exact import Exactness, all_steps

pytestmark = pytest.mark.slow


def test_uncompiled_run_resumes(tmp_path):
    run = Exactness(tmp_path)
    assert run.resumed(all_steps(every=10), "arrays") == []
    assert run.interrupted(["EvalStep", "EvalEnd", "EpochEnd"], "arrays") == []


def test_compiled_run_resumes(tmp_path):
    run = Exactness(tmp_path, compiled=True)
    assert run.resumed([11, 37], "arrays") == []
    assert run.interrupted(["EvalStep"], "arrays") == []


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [("arrays", "prefetch", 23), ("workers=0", "workers=2", 23), ("prefetch workers=2", "workers=0", 8)],
)
def test_run_resumes_with_prefetch_or_different_worker_count(tmp_path, before, after, step):
    assert Exactness(tmp_path, data=before).resumed([step], after) == []


def test_difference_between_runs_is_detected(tmp_path):
    run = Exactness(tmp_path, data="workers=0")  # this source adds noise to its samples
    (difference,) = run.resumed([40], "arrays")
    assert difference.startswith('resumed after step 40: expected {"event": "StepBegin", "step": 41')
