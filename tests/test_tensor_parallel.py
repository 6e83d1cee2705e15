"""Tensor parallel training: ranks that have one model together train like one process."""

import pytest

from tests import shared_checks

pytestmark = pytest.mark.slow

CHECKS = [
    "placements",
    "twenty_steps",
    "twenty_steps_traced",
    "other_derivatives_and_precisions",
    "optimizers",
    "recomputed_blocks",
    "replicated_state_on_two_axes",
    "evaluations",
    "handwritten_gradients",
    "dict_of_models_with_frozen_parts",
    "graph_text",
    "explained",
    "refused_plans",
    "refused_passes",
    "runs",
    "callbacks_of_the_loop",
    "checkpoints",
    "compiled_by_inductor",
]


# Two data ranks of two ranks per model.
FOUR = [
    "groups_without_operators",
    "twenty_steps",
    "nan_on_one_data_rank",
    "synced_batch_norm",
    "graph_text",
    "runs",
    "checkpoints",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Runs all checks with two ranks that have one model together, and returns the errors of each."""
    return run(CHECKS, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def outcomes_of_four(tmp_path_factory):
    return run(FOUR, 4, tmp_path_factory.mktemp("four"))


def run(names, size, folder):
    limits = {"timeout": 480, "collective_timeout": 120}
    return shared_checks.outcomes("tensor_parallel_checks", names, size=size, model=2, folder=folder, **limits)


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(outcomes, name):
    shared_checks.assert_passed(outcomes, name)


@pytest.mark.parametrize("name", FOUR)
def test_two_models_of_two_ranks(outcomes_of_four, name):
    shared_checks.assert_passed(outcomes_of_four, name)
