"""Fully sharded training: two ranks with a part of each large tensor train like ranks with the whole state."""

import pytest

from tests import shared_checks

STEPS = [
    "placements",
    "memory_at_rest",
    "twenty_steps",
    "schedules",
    "random_schedules",
    "peaks",
    "peaks_of_microbatches",
    "steps_with_rounding_noise",
    "nan_on_one_rank",
    "optimizers",
    "callbacks_in_the_step",
    "microbatches_and_policies",
    "graph_text",
    "explained",
    "refused",
    "refused_operations_say_why",
    "compiled_by_inductor",
]
RUNS = [
    "runs",
    "callbacks_of_the_loop",
    "checkpoints",
    "rewinds",
    "divergence_is_that_of_all_ranks",
    "failed_ranks_do_not_save",
    "compiled_runs",
]


def outcomes(names, folder):
    return shared_checks.outcomes("sharded_checks", names, timeout=480, collective_timeout=120, folder=folder)


@pytest.fixture(scope="module")
def outcomes_of_steps(tmp_path_factory):
    """Runs the checks of steps with two ranks, and returns the errors of each."""
    return outcomes(STEPS, tmp_path_factory.mktemp("steps"))


@pytest.fixture(scope="module")
def outcomes_of_runs(tmp_path_factory):
    """Runs the checks of runs with two ranks, and returns the errors of each."""
    return outcomes(RUNS, tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_steps_of_two_ranks(outcomes_of_steps, name):
    shared_checks.assert_passed(outcomes_of_steps, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_of_two_ranks(outcomes_of_runs, name):
    shared_checks.assert_passed(outcomes_of_runs, name)
