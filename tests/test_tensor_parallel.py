"""Tensor parallel training: ranks that have one model together train like one process."""

import pytest

STEPS, RUNS = "tensor_parallel_checks", "tensor_parallel_run_checks"
TWO = {
    STEPS: [
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
        "compiled_by_inductor",
    ],
    RUNS: ["runs", "callbacks_of_the_loop", "checkpoints"],
}
# Two data ranks of two ranks per model.
FOUR = {
    STEPS: ["groups_without_operators", "twenty_steps", "nan_on_one_data_rank", "synced_batch_norm", "graph_text"],
    RUNS: ["runs", "checkpoints"],
}
CHECKS = {2: TWO, 4: FOUR}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "module", "name"),
    [(size, module, name) for size in CHECKS for module in CHECKS[size] for name in CHECKS[size][module]],
)
def test_ranks(checked, size, module, name):
    checked(name, module, CHECKS[size][module], size=size, model=2)
