"""A compiled step keeps freed CPU memory in the process, unless the user configures malloc otherwise."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
import fxtrain as fx

module = torch.nn.Sequential(*[part for _ in range(4) for part in (torch.nn.Linear(64, 64), torch.nn.ReLU())])
tx = fx.optim.sgd(0.1)
step = fx.compile(fx.train_step(lambda model, batch: model(batch).square().mean(), tx), donate=True)
state, batch = fx.init(module, tx), torch.ones(5000, 64)

def take(count):
    global state
    for _ in range(count):
        state, _ = step(state, batch)

take(20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take(50)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 50)
"""


def faults_a_step(**variables):
    """Returns the number of page faults per step."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_steps_reuse_freed_pages_by_default():
    assert faults_a_step() < 50
    assert faults_a_step(MALLOC_TRIM_THRESHOLD_="131072") > 500  # 4 KiB each: over 2 MB of the step's 10 MB
