"""Compiled steps on a machine without a C++ compiler."""

import os
import subprocess
import sys

import pytest

CODE = """
import warnings, torch, fxtrain as fx

tx = fx.optim.sgd(0.1)
step = fx.train_step(lambda model, batch: model(batch).mean(), tx)
state, batch = fx.init(torch.nn.Linear(4, 1), tx), torch.ones(2, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", UserWarning)
    compiled = fx.compile(step)
    found, expected = compiled(state, batch), step(state, batch)
print(*(each.message for each in caught), compiled.route, sep="\\n")
assert all(map(torch.equal, fx.tree.leaves(found), fx.tree.leaves(expected)))
try:
    fx.compile(step, fullgraph=True)(state, batch)
except Exception as error:
    print(error)
"""
REASON = (
    "  Inductor finds no working C++ compiler. Install g++ or clang++, or name one in the environment variable CXX."
)
NAME = "<step train_step(<lambda>), fires Microbatch, Gradients, Updated>"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names a program")
def test_step_runs_uncompiled_and_the_warning_says_what_is_missing(tmp_path):
    variables = {**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    variables.pop("TORCHINDUCTOR_VEC_ISA_OK", None)
    done = subprocess.run([sys.executable, "-c", CODE], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"{NAME} cannot be compiled:",
        REASON,
        "Compiled instead: nothing, so the step runs uncompiled. Results are the same.",
        "uncompiled",
        f"expected {NAME} to be compiled (fullgraph=True), got no compiler:",
        REASON,
    ]
