"""Fully sharded training: two ranks with a part of each large tensor train like ranks with the whole state."""

import json

import pytest

from tests import ranks

CHECKS = [
    "placements",
    "memory_at_rest",
    "twenty_steps",
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
    code = f"from tests import sharded_checks\nsharded_checks.run({CHECKS!r}, {str(folder)!r})"
    results = ranks.run(code, 2, timeout=240, check=False)
    found = {"stderr": [done.stderr for done in results]}
    for line in results[0].stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(outcomes, name):
    errors = outcomes.get(name, ["not run, because an earlier check failed", *outcomes["stderr"]])
    assert not any(errors), "\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
