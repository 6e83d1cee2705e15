"""Tensor parallel training: ranks that have one model together train like one process."""

import pytest

from tests import shared_checks

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
    "graph_text",
    "refused_plans",
    "refused_passes",
    "compiled_by_inductor",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Runs all checks with two ranks that have one model together, and returns the errors of each."""
    folder = tmp_path_factory.mktemp("split")
    return shared_checks.outcomes(
        "tensor_parallel_checks", CHECKS, timeout=240, collective_timeout=60, folder=folder, model=2
    )


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(outcomes, name):
    shared_checks.assert_passed(outcomes, name)
