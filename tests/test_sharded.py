"""Fully sharded training: two ranks with a part of each large tensor train like ranks with the whole state."""

import pytest

from tests import shared_checks

CHECKS = [
    "placements",
    "memory_at_rest",
    "twenty_steps",
    "schedules",
    "random_schedules",
    "peaks",
    "nan_on_one_rank",
    "optimizers",
    "callbacks_in_the_step",
    "microbatches_and_policies",
    "graph_text",
    "refused",
    "refused_operations_say_why",
    "runs",
    "callbacks_of_the_loop",
    "checkpoints",
    "rewinds",
    "divergence_is_that_of_all_ranks",
    "failed_ranks_do_not_save",
    "compiled_by_inductor",
    "compiled_runs",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Runs all checks with two ranks, and returns the errors of each."""
    folder = tmp_path_factory.mktemp("sharded")
    return shared_checks.outcomes("sharded_checks", CHECKS, timeout=240, collective_timeout=60, folder=folder)


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(outcomes, name):
    shared_checks.assert_passed(outcomes, name)
