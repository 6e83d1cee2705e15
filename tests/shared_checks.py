"""Checks that all ranks of a run make together: functions of a module, in the processes of one run.

A check takes a mesh, and the path of a new folder that all ranks share, if it has a second parameter. It fails on a
rank by raising. The fixture ``checked`` runs all checks of a module once.
"""

import importlib
import inspect
import json
import pathlib
import sys
import traceback

import torch

import fxtrain as fx
from tests import ranks


def outcomes(module, names, folder, *, timeout=480, collective_timeout=120, size=2, model=1, on_gpu=False):
    """Runs checks with several ranks, and returns the errors of each by name.

    Args:
        module: Name of the module in ``tests`` that has the checks.
        names: The checks, in order.
        folder: An empty folder.
        timeout: Seconds for all checks.
        collective_timeout: Seconds for a collective.
        size: Number of ranks.
        model: Number of ranks per model.
        on_gpu: Whether the ranks train on one GPU, with NCCL.
    """
    given = module, names, str(folder), collective_timeout, model
    code = f"from tests import shared_checks\nshared_checks.run(*{given!r})"
    results = ranks.run(code, size, timeout=timeout, check=False, env=ranks.ON_GPU if on_gpu else None)
    found = {"stderr": [done.stderr for done in results]}
    for line in results[0].stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


def run(module, names, folder, collective_timeout, model):
    """Runs checks on this rank, and prints the outcomes of all ranks as one line of JSON each."""
    torch.set_num_threads(1)
    checks = importlib.import_module(f"tests.{module}")
    mesh = fx.distributed.mesh(model=model, timeout=collective_timeout)
    if mesh.device.type == "cuda":
        torch.set_default_device(mesh.device)  # of models and data that the checks make
    for name in names:
        outcome = ""
        try:
            check = getattr(checks, name)
            check(*(mesh, pathlib.Path(folder) / name)[: len(inspect.signature(check).parameters)])
        except BaseException:
            outcome = traceback.format_exc()
            print(outcome, file=sys.stderr, flush=True)  # in case the other ranks do not come to the gather
        found = mesh.gather(outcome, f"outcome of {name}")
        if mesh.is_main:
            print(json.dumps({name: found}), flush=True)
        if any(found) and not all(found):
            sys.exit(1)  # the ranks may have parted


def assert_passed(found, name):
    """Fails with the errors of all ranks unless a check has passed on each."""
    errors = found.get(name, ["not run, because an earlier check failed", *found["stderr"]])
    assert not any(errors), "\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
