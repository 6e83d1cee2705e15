"""Data parallel training: two and four ranks train like one process, with the same bits on all ranks."""

import pytest

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


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_like_one_process(checked, name):
    checked(name, "rank_checks", TWO)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_train_like_one_process(checked, name):
    checked(name, "rank_checks", FOUR, size=4)
