"""Ranks on a GPU: one process, and two that share it. The checks are those of ranks on CPUs.

Seen on an H200 with torch 2.11. A rank that is killed within a step leaves the other in a collective of NCCL, whose
watchdog ended it a minute later.
"""

import signal
import time

import pytest
import torch

from tests import (
    ranks,
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
    (1, "rank_checks"): [name for name in test_data_parallel.TWO if name not in OF_TWO],
    (2, "rank_checks"): test_data_parallel.TWO,
    (2, "rank_runs"): test_distributed_runs.CHECKS,
    (2, "program_checks"): test_rank_programs.CHECKS,
    **{(2, module): names for module, names in test_sharded.CHECKS.items()},
    **{(2, module): names for module, names in test_tensor_parallel.TWO.items()},
}


@pytest.mark.parametrize(("size", "module", "name"), [(*key, name) for key in CHECKS for name in CHECKS[key]])
def test_ranks(checked, size, module, name):
    model = 2 if module in test_tensor_parallel.TWO else 1
    checked(name, module, CHECKS[size, module], size=size, model=model, on_gpu=True)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("failure", "code", "text"),
    [
        ("hanging", None, "the all-reduce of agreement of ranks at step 4 within 3 s"),
        ("killed", -signal.SIGKILL, "the all-reduce of agreement of ranks at step 4 within 30 s"),
        ("failing_in_a_step", 1, "the collectives of the training step at step 3 within 30 s"),
    ],
)
def test_lost_rank_ends_the_other(failure, code, text, rank):
    """The ranks meet through the host, which notices a loss that NCCL reports a minute later."""
    program = "import torch\nfrom tests import rank_programs\ntorch.set_default_device('cuda')"
    call = f"rank_programs.{failure}({rank})"
    began = time.monotonic()
    with ranks.started(f"{program}\n{call}", 2, env=ranks.ON_GPU) as started:
        lost, other = started.processes[rank], started.processes[1 - rank]
        assert other.wait(40) == 1
        assert time.monotonic() - began < 40
        assert f"LostRankError: expected all 2 ranks to join {text}" in other.communicate()[1]
        assert code is None or lost.wait(10) == code
