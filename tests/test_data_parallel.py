"""Data parallel training: two and four ranks train like one process, with the same bits on all ranks."""

import pytest

from tests import shared_checks

pytestmark = pytest.mark.slow

TWO = [
    "host_facts",
    "collectives_in_a_graph",
    "twenty_steps",
    "twenty_steps_traced",
    "by_autograd",
    "float32_sgd",
    "uneven_batches",
    "weighted_losses",
    "microbatch_callbacks",
    "transformed_batches",
    "nan_on_one_rank",
    "used_parameters",
    "batch_norm_statistics",
    "synced_batch_norm",
    "graph_text",
    "evaluation",
    "hand_written_steps",
    "growing_metrics",
    "several_buckets",
    "replicated_states",
    "precision_policies",
    "miscompiled_on_one_rank",
    "compiled_by_inductor",
]
FOUR = ["host_facts", "twenty_steps", "uneven_batches", "rank_without_examples", "evaluation", "nan_on_one_rank"]


@pytest.fixture(scope="module")
def outcomes():
    """Runs all checks of a number of ranks in one run, and returns the errors of each check."""
    found = {}

    def of(size, names):
        if size not in found:
            found[size] = shared_checks.outcomes("rank_checks", names, timeout=480, collective_timeout=120, size=size)
        return found[size]

    return of


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_like_one_process(outcomes, name):
    shared_checks.assert_passed(outcomes(2, TWO), name)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_train_like_one_process(outcomes, name):
    shared_checks.assert_passed(outcomes(4, FOUR), name)
