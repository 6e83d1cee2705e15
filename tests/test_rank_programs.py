"""Programs of several ranks: repeated parts with transfers are compiled once, and all ranks compile some of them."""

import functools

import pytest

from tests import shared_checks

CHECKS = [
    "sharded_layers",
    "sent_memory_is_not_reused",
    "replicated_updates",
    "parts_are_compiled_by_all_ranks",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Returns a function that runs all checks with two ranks once, and returns the errors of each."""

    @functools.cache
    def run():
        limits = {"timeout": 480, "collective_timeout": 120, "folder": tmp_path_factory.mktemp("checks")}
        return shared_checks.outcomes("program_checks", CHECKS, **limits)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(outcomes, name):
    shared_checks.assert_passed(outcomes(), name)
