"""The checks of ``fxtrain.testing``: they accept what is equal and name what differs."""

import math

import pytest
import torch

from fxtrain import testing

EQUAL = [
    torch.tensor([1.0, -0.0, math.nan, math.inf]),
    torch.tensor([1 + 2j, complex(math.nan, -0.0)]),
    torch.tensor([1.0, -0.0], dtype=torch.bfloat16),
    torch.tensor([2**62 + 1]),
    torch.tensor([]),
    torch.tensor(True),
]


@pytest.mark.parametrize("value", EQUAL, ids=str)
def test_equal_trees_pass(value):
    testing.assert_equal({"a": (value, 1)}, {"a": (value.clone(), 1)}, "copies")


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (0.0, -0.0),
        (math.nan, 0.0),
        (0.0, math.nan),
        (math.inf, torch.finfo(torch.float32).max),
        (complex(0.0, 1.0), complex(-0.0, 1.0)),
        (1, 1.0),
        (2**62, 2**62 + 1),
        ([1.0], [[1.0]]),
    ],
)
def test_different_leaf_is_named(got, expected):
    with pytest.raises(AssertionError, match=r"the run: expected got\['a'\] to be"):
        testing.assert_equal({"a": torch.tensor(got)}, {"a": torch.tensor(expected)}, "the run")


def test_missing_leaf_is_named():
    with pytest.raises(AssertionError, match=r"expected the same leaves, got differences in \[\"got\['b'\]\"\]"):
        testing.assert_equal({"a": 1}, {"a": 1, "b": 2}, "the run")
