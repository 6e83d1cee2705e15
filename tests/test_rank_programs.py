"""Programs of several ranks: repeated parts with transfers are compiled once, and all ranks compile some of them."""

import pytest

CHECKS = [
    "sharded_layers",
    "sent_memory_is_not_reused",
    "replicated_updates",
    "code_that_cannot_be_stored",
    "parts_are_compiled_by_all_ranks",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(checked, name):
    checked(name, "program_checks", CHECKS)
