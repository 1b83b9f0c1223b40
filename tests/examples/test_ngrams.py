"""Tables of counts, against the formula written down for one context after the other."""

from __future__ import annotations

import numpy as np
import pytest

from ngrams import NGrams


def by_hand(characters, targets, kinds, longest, asked):
    """Witten and Bell's P(target = each kind | context ``asked``), with no thought of speed."""
    chance = np.full(kinds, 1 / kinds)
    for length in range(longest + 1):
        context = asked[len(asked) - length :]
        followers = [
            targets[end]
            for end in range(longest, len(characters))
            if list(characters[end + 1 - length : end + 1]) == list(context)
        ]
        if followers:
            counts, new = np.bincount(followers, minlength=kinds), len(set(followers))
            chance = (counts + new * chance) / (len(followers) + new)
    return chance


@pytest.mark.parametrize("longest", [0, 1, 3])
def test_chances(longest):
    generator = np.random.default_rng(longest)
    characters, targets = generator.integers(0, 3, 80), generator.integers(0, 4, 80)
    table = NGrams(characters, targets, 3, 4, longest)
    asked, wanted = generator.integers(0, 3, 40), generator.integers(0, 4, 40)
    got, every = table.chance(asked, wanted), [table.chance(asked, kind) for kind in range(4)]
    assert got.shape == (40 - longest,)
    np.testing.assert_allclose(np.sum(every, 0), 1)
    for place in range(longest, 40):
        expected = by_hand(characters, targets, 4, longest, asked[place + 1 - longest : place + 1])
        np.testing.assert_allclose(got[place - longest], expected[wanted[place]])
        assert table.likeliest(asked)[place - longest] == expected.argmax()


def test_a_context_that_was_never_seen():
    """Falls back to shorter ones."""
    table = NGrams(np.array([0, 1, 0, 1]), np.array([1, 0, 1, 0]), 3, 2, 1)
    np.testing.assert_allclose(table.chance(np.array([0, 2]), 1), NGrams(
        np.array([1, 0, 1]), np.array([0, 1, 0]), 3, 2, 0).chance(np.array([2]), 1))  # fmt: skip


@pytest.mark.parametrize("longest", [-1, 9])
def test_contexts_that_do_not_fit(longest):
    with pytest.raises(ValueError, match=f"0 to 8 of 128 characters, got longest={longest}"):
        NGrams(np.zeros(20, int), np.zeros(20, int), 128, 128, longest)
    NGrams(np.full(20, 127), np.full(20, 127), 128, 128, 8)


@pytest.mark.parametrize(("characters", "targets"), [(3, 3), (9, 8)])
def test_texts_that_do_not_fit(characters, targets):
    with pytest.raises(ValueError, match=f"got {characters} characters and {targets} targets"):
        NGrams(np.zeros(characters, int), np.zeros(targets, int), 2, 2, 3)
