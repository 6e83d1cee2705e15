"""Checkpoints that several ranks write together: whole or not listed, and restored by any number of ranks, bitwise."""

import pytest

from tests import shared_checks

CHECKS = [
    "worlds",
    "each_rank_writes_and_reads_its_slices",
    "full_disk_of_a_rank_fails_the_save",
    "damage_of_a_part_is_found_by_all_ranks",
    "folder_that_a_rank_cannot_see_is_named",
    "refused_saves_leave_no_rank_waiting",
    "readers_that_do_not_agree_are_refused",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def outcomes(folder):
    """Runs all checks with two ranks, and returns the errors of each."""
    return shared_checks.outcomes("part_checks", CHECKS, timeout=240, collective_timeout=60, folder=folder)


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(outcomes, name):
    shared_checks.assert_passed(outcomes, name)
