"""The compression baselines against their formulas, computed one count at a time."""

import lzma
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxtrain.cli._baselines import _kneser_ney, trigram_bits, unigram_bits, xz_bits


def as_bytes(text: bytes) -> torch.Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def brute_force(train: bytes):
    """Returns ``p(byte, context)`` of modified Kneser-Ney smoothing, computed one count at a time."""
    trigrams = Counter(train[i : i + 3] for i in range(len(train) - 2))
    bigrams = Counter(gram[1:] for gram in trigrams)
    unigrams = Counter(gram[1:] for gram in bigrams)
    levels = [unigrams, bigrams, trigrams]
    discounts = []
    for counts in levels:
        n1, n2, n3, n4 = (sum(count == k for count in counts.values()) for k in (1, 2, 3, 4))
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            wanted = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            discounts.append([max(d, 0.1) for d in wanted])
        else:
            discounts.append([0.5, 1, 1.5])
    followers = [defaultdict(list) for _ in levels]
    for counts, after in zip(levels, followers, strict=True):
        for gram, count in counts.items():
            after[gram[:-1]].append(count)

    def p(byte: int, context: bytes) -> float:
        order = len(context)
        lower = p(byte, context[1:]) if order else 1 / 256
        seen = followers[order][context]
        if not seen:
            return lower
        d = discounts[order]
        count = levels[order][context + bytes([byte])]
        mass = sum(d[min(k, 3) - 1] for k in seen)
        return (count - (d[min(count, 3) - 1] if count else 0) + mass * lower) / sum(seen)

    return p


TEXTS = [
    b"",
    b"a",
    b"ab",
    b"abc",
    b"abracadabra, abracadabra",
    bytes(range(256)),
    b"the cat sat on the mat; " * 9 + b"a rat?",
]


@pytest.mark.parametrize("train", TEXTS)
@pytest.mark.parametrize("validation", [b"a", b"ab", b"the abracadabra \xff\x00 mat"])
def test_trigram_bits_equal_modified_kneser_ney(train, validation):
    p = brute_force(train)
    bits = [-math.log2(p(c, validation[max(0, i - 2) : i])) for i, c in enumerate(validation)]
    assert trigram_bits(as_bytes(train), as_bytes(validation)) == pytest.approx(sum(bits) / len(bits), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=8, max_size=8), min_size=1, max_size=20))
def test_smoothed_counts_are_probabilities(rows):
    counts = np.array(rows)
    p = _kneser_ney(counts, _kneser_ney(np.count_nonzero(counts, axis=0), np.float32(1 / 8)))
    assert p.sum(-1) == pytest.approx(1, rel=1e-5)
    assert (p > 0).all()


def test_unigram_of_uniform_bytes_is_eight_bits():
    uniform = torch.arange(256, dtype=torch.uint8).repeat(3)
    assert unigram_bits(uniform, uniform) == 8.0


def test_unigram_uses_add_one_smoothing():
    wanted = -(3 * math.log2(4 / 260) + math.log2(1 / 260)) / 4
    assert unigram_bits(as_bytes(b"aaab"), as_bytes(b"aaac")) == pytest.approx(wanted)


def test_random_bytes_compress_to_eight_bits():
    noise = torch.randint(256, (1 << 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert unigram_bits(noise, noise) == pytest.approx(8, abs=0.01)
    assert xz_bits(noise) == pytest.approx(8, abs=0.02)
    held_out = torch.randint(256, (1 << 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert 7.99 < trigram_bits(noise, held_out) < 9


def test_trigram_uses_context():
    train, validation = as_bytes(b"0123456789" * 100), as_bytes(b"3456789012" * 10)
    assert unigram_bits(train, validation) == pytest.approx(math.log2(10), abs=0.4)
    assert trigram_bits(train, validation) < 0.1


def test_xz_bits_equal_lzma():
    text = b"the same line again\n" * 1000
    assert xz_bits(as_bytes(text)) == len(lzma.compress(text, preset=9)) * 8 / len(text)
