"""The zoo's checks, on cases without packages. ``python -m benchmarks.zoo`` runs all cases."""

import dataclasses

import pytest
from torch import nn

import zoo
from zoo import checks


def test_zoo_holds_enough_architectures_and_packages():
    cases = zoo.cases()
    assert len(cases) >= 75
    assert len({case.package for case in cases.values()}) >= 12


@pytest.mark.parametrize("key", ["torch: u-net by hand", "torch: dqn, frozen target"])
def test_case_trains_as_in_a_plain_loop(key):
    assert checks.parity(zoo.cases()[key]) <= checks.EXACT


def test_parity_refuses_other_numbers():
    case = zoo.cases()["torch: dqn, frozen target"]
    losses = iter([1.0] * checks.STEPS + [1.1] * checks.STEPS)
    wrong = dataclasses.replace(case, loss=lambda model, batch: next(losses) * case.loss(model, batch))
    with pytest.raises(checks.CheckError, match="differs from a plain loop"):
        checks.parity(wrong)


def test_parity_refuses_a_case_that_trains_nothing():
    case = zoo.cases()["torch: triplet embedding"]
    idle = dataclasses.replace(case, build=lambda p: nn.Linear(4, 4), plain=lambda m, o, b: case.loss(m, b))
    with pytest.raises(checks.CheckError, match="no parameter"):
        checks.parity(idle)
