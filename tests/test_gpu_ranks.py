"""Ranks on a GPU: one process with NCCL, and two that share the GPU. The checks are those of ranks on CPUs."""

import functools

import pytest
import torch

from tests import (
    shared_checks,
    test_data_parallel,
    test_distributed_runs,
    test_rank_programs,
    test_sharded,
    test_tensor_parallel,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# A check of differences between ranks needs two.
OF_TWO = {"synced_batch_norm", "replicated_states", "miscompiled_on_one_rank"}
CHECKS = {
    ("nccl", "rank_checks"): [name for name in test_data_parallel.TWO if name not in OF_TWO],
    ("host", "rank_checks"): test_data_parallel.TWO,
    ("host", "rank_runs"): test_distributed_runs.CHECKS,
    ("host", "program_checks"): test_rank_programs.CHECKS,
    **{("host", module): names for module, names in test_sharded.CHECKS.items()},
    **{("host", module): names for module, names in test_tensor_parallel.TWO.items()},
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Returns a function that runs all checks of a module once, and returns the errors of each."""

    @functools.cache
    def run(backend, module):
        size = 1 if backend == "nccl" else 2
        folder = None if module == "rank_checks" else tmp_path_factory.mktemp("checks")
        limits = {"timeout": 480, "collective_timeout": 120, "folder": folder}
        model = 2 if module in test_tensor_parallel.TWO else 1
        return shared_checks.outcomes(
            module, CHECKS[backend, module], size=size, model=model, backend=backend, **limits
        )

    return run


@pytest.mark.parametrize(("backend", "module", "name"), [(*key, name) for key in CHECKS for name in CHECKS[key]])
def test_ranks(outcomes, backend, module, name):
    shared_checks.assert_passed(outcomes(backend, module), name)
