"""Fully sharded training: two ranks with a part of each large tensor train like ranks with the whole state."""

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), [(module, name) for module in CHECKS for name in CHECKS[module]])
def test_two_ranks(checked, module, name):
    checked(name, module, CHECKS[module])
