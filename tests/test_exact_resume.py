"""A run cut and resumed in a new process has bitwise the events, requests, logs and states of an uninterrupted run.

These tests make some of the cuts. `python -m benchmarks.reliability --full` makes all of them.
"""

import processes
import pytest

from benchmarks.reliability.exact import Exactness, all_steps

pytestmark = pytest.mark.slow


def exactness(folder, **options):
    return Exactness(folder, python=processes.run, **options)


def test_uncompiled_run_resumes(tmp_path):
    run = exactness(tmp_path)
    assert run.resumed(all_steps(every=10), "arrays") == []
    assert run.interrupted(["EvalStep", "EvalEnd", "EpochEnd"], "arrays") == []


def test_compiled_run_resumes(tmp_path):
    run = exactness(tmp_path, compiled=True)
    assert run.resumed([37], "arrays") == []
    assert run.interrupted(["EvalStep"], "arrays") == []


def test_run_resumes_in_a_process_with_another_hash_seed(tmp_path):
    assert Exactness(tmp_path).resumed([23], "prefetch") == []  # processes of their own, and with prefetching


@pytest.mark.parametrize(
    ("before", "after", "step"), [("workers=0", "workers=2", 23), ("prefetch workers=2", "workers=0", 8)]
)
def test_run_resumes_with_prefetch_or_different_worker_count(tmp_path, before, after, step):
    assert exactness(tmp_path, data=before).resumed([step], after) == []


def test_difference_between_runs_is_detected(tmp_path):
    run = exactness(tmp_path, data="workers=0")  # this source adds noise to its samples
    (difference,) = run.resumed([40], "arrays")
    assert difference.startswith('resumed after step 40: expected {"event": "StepBegin", "step": 41')
