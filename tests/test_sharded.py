"""Fully sharded training: two ranks with a part of each large tensor train like ranks with the whole state."""

import functools

import pytest

from tests import shared_checks

CHECKS = {
    "sharded_checks": [
        "placements",
        "states_that_differ",
        "memory_at_rest",
        "twenty_steps",
        "steps_with_rounding_noise",
        "nan_on_one_rank",
        "optimizers",
        "callbacks_in_the_step",
        "microbatches_and_policies",
        "explained",
        "refused",
        "refused_operations_say_why",
        "compiled_by_inductor",
    ],
    "sharded_schedule_checks": [
        "schedules",
        "random_schedules",
        "peaks",
        "peaks_of_microbatches",
        "graph_text",
    ],
    "sharded_run_checks": [
        "runs",
        "callbacks_of_the_loop",
        "checkpoints",
        "rewinds",
        "divergence_is_that_of_all_ranks",
        "failed_ranks_do_not_save",
        "compiled_runs",
    ],
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Returns a function that runs all checks of a module with two ranks once, and returns the errors of each."""

    @functools.cache
    def run(module):
        limits = {"timeout": 480, "collective_timeout": 120, "folder": tmp_path_factory.mktemp("checks")}
        return shared_checks.outcomes(module, CHECKS[module], **limits)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), [(module, name) for module in CHECKS for name in CHECKS[module]])
def test_two_ranks(outcomes, module, name):
    shared_checks.assert_passed(outcomes(module), name)
