"""The order of an epoch: a computed permutation of any size with random access."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fxtrain.data._epoch_order import Order, mix, permuted


@given(size=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_epoch_has_every_item_once(size, seed, epoch):
    assert sorted(Order(size, seed=seed).items(epoch, 0, size).tolist()) == list(range(size))


@given(size=st.integers(2, 5000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permuted_is_a_permutation_for_any_size(size, key):
    assert np.array_equal(np.sort(permuted(np.arange(size, dtype=np.uint64), size, key)), np.arange(size))


@given(data=st.data(), size=st.sampled_from([10, 2**14, 2**14 + 1, 50_000]))
@settings(max_examples=40, deadline=None)
def test_range_of_items_matches_slice_of_the_epoch(data, size):
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    whole = Order(size, seed=5).items(2, 0, size)
    assert np.array_equal(np.sort(whole), np.arange(size))
    assert np.array_equal(Order(size, seed=5).items(2, start, stop), whole[start:stop])


@pytest.mark.parametrize("size", [100, 40_000])
def test_orders_differ_between_epochs_and_seeds(size):
    orders = [Order(size, seed=seed).items(epoch, 0, size) for seed in range(3) for epoch in range(3)]
    agreements = [int((a == b).sum()) for a, b in itertools.combinations(orders, 2)]
    assert max(agreements) <= 8  # agreements are Poisson with mean 1, so 9 or more have probability 1e-6 per pair


def test_orders_are_stable_across_versions():
    assert Order(10, seed=0).items(0, 0, 10).tolist() == [1, 8, 9, 3, 6, 5, 0, 7, 4, 2]
    assert Order(10, seed=-7).items(3, 0, 10).tolist() == [4, 6, 0, 9, 2, 7, 8, 1, 3, 5]
    large = Order(10**8, seed=0).items(3, 12_345_678, 12_345_683)
    assert large.tolist() == [80312633, 62244421, 83687984, 24101437, 59317673]
    assert mix(1, 2, 3) == 16914669369030367833


def test_small_orders_are_equally_likely():
    found = collections.Counter(tuple(Order(4, seed=s).items(e, 0, 4).tolist()) for s in range(40) for e in range(150))
    assert stats.chisquare([found[order] for order in itertools.permutations(range(4))]).pvalue > 0.01


@pytest.mark.parametrize("size", [1000, 20_011])
def test_large_orders_are_uniform_in_position_and_difference(size):
    bins = 10
    places, steps = np.zeros((bins, bins)), np.zeros(bins)
    for epoch in range(60):
        items = permuted(np.arange(size, dtype=np.uint64), size, mix(1, epoch)).astype(np.int64)
        np.add.at(places, (np.arange(size) * bins // size, items * bins // size), 1)
        np.add.at(steps, (np.diff(items) % size) * bins // size, 1)
    assert stats.chi2_contingency(places).pvalue > 0.01
    assert stats.chisquare(steps).pvalue > 0.01
